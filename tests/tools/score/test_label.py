"""Comparisons that a reward makes of the responses which `generate` wrote."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.config import Source
from pipeline.data.readers import read_source
from pipeline.tools.score import chunks
from tests.tools.score.commands import interrupted, jsonl, rows_of

REWARDS = """
def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def expected(completions, answer, **columns):
    return [float(text == key) for text, key in zip(completions, answer, strict=True)]

calls = []
def counted(completions, **columns):
    calls.extend(completions)
    return [0.0] * len(completions)
"""
ROWS = [
    {"prompt": "Name a fruit.", "id": 1, "response_1": "Fig.", "response_2": "An apple.", "answer": "Fig."},
    {"prompt": "7+5=", "id": 2, "response_1": "12", "response_2": "13", "answer": "12"},
]


@pytest.fixture(autouse=True)
def _functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "label_rewards.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def label(rows: list[Any], output: str, *more: str, reward: str = "label_rewards:length") -> int:
    source = str(jsonl(Path("answers.jsonl"), rows))
    return cli.main(["label", "--reward", reward, "--input", source, "--output", output, *more])


def test_the_higher_reward_is_chosen_and_equal_rewards_are_a_tie() -> None:
    assert label(ROWS, "labels.jsonl") == 0
    assert rows_of(Path("labels.jsonl")) == [
        {
            "prompt": "Name a fruit.",
            "id": 1,
            "answer": "Fig.",
            "chosen": "An apple.",
            "rejected": "Fig.",
            "preference": 1.0,
            "chosen_score": 9.0,
            "rejected_score": 4.0,
            "labeller": "label_rewards:length",
        },
        {
            "prompt": "7+5=",
            "id": 2,
            "answer": "12",
            "chosen": "12",
            "rejected": "13",
            "preference": 0.5,
            "chosen_score": 2.0,
            "rejected_score": 2.0,
            "labeller": "label_rewards:length",
        },
    ]


def test_a_function_reads_the_other_columns_of_the_row() -> None:
    assert label(ROWS, "labels.csv", reward="label_rewards:expected") == 0
    assert [row["chosen"] for row in rows_of(Path("labels.csv"))] == ["Fig.", "12"]


def test_prepare_reads_the_file_as_comparisons() -> None:
    assert label(ROWS, "labels.jsonl") == 0
    records = [item for item in read_source(Source(path="labels.jsonl")) if not item.fault]
    assert [item.kind for item in records] == ["comparisons", "comparisons"]
    names = ("prompt", "chosen", "rejected", "preference")
    assert [[item.record.get(name) for name in names] for item in records] == [
        ["Name a fruit.", "An apple.", "Fig.", 1.0],
        ["7+5=", "12", "13", 0.5],
    ]


def test_every_pair_of_different_responses_is_compared_and_each_is_scored_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import label_rewards

    row = {"prompt": "Why?", "response_1": "a", "response_2": "b", "response_3": "a", "response_10": "c"}
    label_rewards.calls.clear()
    monkeypatch.setattr(chunks, "CHUNK", 256)
    assert label([row, row], "labels.jsonl", reward="label_rewards:counted") == 0
    pairs = [(row["chosen"], row["rejected"]) for row in rows_of(Path("labels.jsonl"))]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")] * 2
    assert label_rewards.calls == ["a", "b", "c"] * 2


def test_pairs_are_drawn_by_the_seed_and_the_row() -> None:
    row = {"prompt": "Why?"} | {f"response_{number}": "x" * number for number in range(1, 9)}
    drawn = []
    for seed in ("0", "0", "1"):
        assert label([row, row], "labels.jsonl", "--pairs=2", "--seed", seed, "--force") == 0
        drawn.append([(len(row["chosen"]), len(row["rejected"])) for row in rows_of(Path("labels.jsonl"))])
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert len(drawn[0]) == 4
    assert drawn[0][:2] != drawn[0][2:]


def test_a_row_without_two_different_responses_is_quarantined(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, {"prompt": "Why?", "response_1": "a", "response_2": "a"}, {"prompt": "x", "response_1": 3}]
    assert label(rows, "labels.jsonl") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "  quarantined: identical-answers 1, not-text 1; see labels.jsonl.quarantine.jsonl",
        "2 rows written, 2 quarantined: labels.jsonl",
    ]
    quarantined = rows_of(Path("labels.jsonl.quarantine.jsonl"))
    assert [row["detail"] for row in quarantined] == [
        "2 responses, 1 of them different",
        "response_1: expected text, found int",
    ]


def test_a_file_without_pairs_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert label([{"prompt": "Why?", "response": "a"}], "labels.jsonl") == 2
    assert capsys.readouterr().err == (
        "error: answers.jsonl: label needs the columns 'response_1' and 'response_2', found prompt, "
        "response; write them with rlhf generate --n 2\n"
    )
    assert label([{"prompt": "Why?", "response_1": "a", "response_2": "a"}], "labels.jsonl") == 2
    assert capsys.readouterr().err == (
        "error: answers.jsonl: no row has two responses to compare; line 1: 2 responses, "
        "1 of them different\n"
    )


def test_interrupted_it_resumes_to_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(ROWS, "whole.jsonl") == 0
    with monkeypatch.context() as patched:
        patched.setattr(chunks, "publish", interrupted)
        assert label(ROWS, "labels.jsonl") == 130
    capsys.readouterr()
    assert label(ROWS, "labels.jsonl") == 0
    assert "2 of 2 rows are done" in capsys.readouterr().out
    assert Path("labels.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
