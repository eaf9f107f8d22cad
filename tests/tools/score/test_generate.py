"""Responses for people to judge, and the way of their verdicts back into `prepare`."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline import cli
from pipeline.config import RECIPES, Source
from pipeline.data.readers import read_source
from pipeline.tools.score import chunks
from tests.tools.score.commands import PARTIAL, PROMPTS, interrupted, jsonl, left, main, rows_of

TWO = [{"prompt": "Name a fruit.", "id": 1}, {"prompt": "Why?", "id": 2}]


@pytest.fixture
def generate(tiny_gpt2: Path) -> Callable[..., int]:
    def run(rows: list[Any], output: str, *more: str, option: str = "--input") -> int:
        source = str(jsonl(Path("prompts.jsonl"), rows))
        argv = ["--policy", str(tiny_gpt2), "--response-tokens", "8", option, source, "--output", output]
        return cli.main(["generate", *argv, *more])

    return run


def texts_of(row: dict[str, Any], n: int) -> list[str]:
    return [row[f"response_{number}"] for number in range(1, n + 1)]


def test_the_responses_are_those_of_which_best_of_n_keeps_the_best(
    generate: Callable[..., int], model: Path, tiny_gpt2: Path
) -> None:
    from pipeline import RewardModel

    settings = ("--n=3", "--seed=5", "--temperature=1.5")
    assert generate(PROMPTS, "out.jsonl", *settings, "--batch-size=4") == 0
    argv = ("--policy", str(tiny_gpt2), "--response-tokens", "8", *settings)
    assert main("best-of-n", model, Path("prompts.jsonl"), "best.jsonl", *argv) == 0
    scorer = RewardModel.load(model)
    responses = set()
    for prompt, row, best in zip(
        PROMPTS, rows_of(Path("out.jsonl")), rows_of(Path("best.jsonl")), strict=True
    ):
        assert list(row) == ["prompt", "id", "response_1", "response_2", "response_3"]
        assert {name: row[name] for name in prompt} == prompt
        texts = texts_of(row, 3)
        scores = scorer.score([row["prompt"]] * 3, texts)
        assert texts[scores.index(max(scores))] == best["response"]
        assert best["reward_mean"] == pytest.approx(sum(scores) / 3, abs=1e-5)
        responses |= {*texts}
    assert len(responses) > 10


def test_a_response_depends_on_the_seed_and_not_on_the_batch(
    generate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(TWO, "out.csv", "--n=3", option="--prompts") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 rows written, 0 quarantined: out.csv"
    assert generate(TWO, "again.csv", "--n=3", "--batch-size=1") == 0
    assert Path("again.csv").read_bytes() == Path("out.csv").read_bytes()
    assert generate(TWO, "other.csv", "--n=3", "--seed=1") == 0
    rows, others = rows_of(Path("out.csv")), rows_of(Path("other.csv"))
    assert [row["prompt"] for row in rows] == ["Name a fruit.", "Why?"]
    assert not {*texts_of(rows[0], 3), *texts_of(rows[1], 3)} & {*texts_of(others[0], 3)}


def test_cut_after_a_chunk_it_ends_in_the_same_bytes(
    generate: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*PROMPTS[:2], {"prompt": " "}, *PROMPTS[2:]]
    assert generate(rows, "whole.csv", "--n=2") == 0
    with monkeypatch.context() as patched:
        patched.setattr(chunks, "publish", interrupted)
        assert generate(rows, "out.csv", "--n=2") == 130
    PARTIAL.write_bytes(b"".join(PARTIAL.read_bytes().splitlines(keepends=True)[:3]) + b"[{")
    capsys.readouterr()
    assert generate(rows, "out.csv", "--n=2") == 0
    assert f"generate: resuming {PARTIAL}: 2 of 5 rows are done" in capsys.readouterr().out
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    (fault,) = rows_of(Path("out.csv.quarantine.jsonl"))
    assert (fault["reason"], fault["line"]) == ("empty-text", 3)
    assert generate(rows, "out.csv", "--n=2") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "generate: unchanged, keeping out.csv"
    assert generate(rows, "out.csv", "--n=3") == 2
    assert "exists already, and was made with another n; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "more", "expected"),
    [
        (
            {"prompt": "Why?", "response_2": "No."},
            (),
            "prompts.jsonl: already has a column 'response_2', which generate would write; rename or "
            "remove it",
        ),
        (
            {"promt": "Why?"},
            (),
            "prompts.jsonl: generate needs a column 'prompt', found promt; did you mean 'promt'?",
        ),
        (
            {"prompt": "Why?"},
            ("--policy=runs/no/sft",),
            "runs/no/sft: does not exist; run: rlhf run --until sft",
        ),
        (
            {"prompt": "Why?"},
            ("--policy-url=localhost:8000",),
            "--policy-url: 'localhost:8000': expected http://host:port alone",
        ),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    row: dict[str, str],
    more: tuple[str, ...],
    expected: str,
    generate: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate([row], "out.csv", *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected}")
    assert left(Path()) == ["prompts.jsonl"]


def test_a_column_that_is_not_written_may_be_there(generate: Callable[..., int]) -> None:
    assert generate([{"prompt": "Why?", "response_2": "No."}], "out.jsonl", "--n=1") == 0
    (row,) = rows_of(Path("out.jsonl"))
    assert list(row) == ["prompt", "response_2", "response_1"]


@pytest.fixture
def judged(generate: Callable[..., int]) -> list[dict[str, Any]]:
    """Rows with two responses; people prefer the second to the first prompt, and the first to the other."""
    assert generate(TWO, "answers.csv", "--n=2", "--temperature=1.5") == 0
    return rows_of(Path("answers.csv"))


def verdicts(path: Path) -> list[Any]:
    items = read_source(Source(path=str(path)))
    assert all(item.fault is None for item in items)
    return [item.record for item in items]


def expected_pairs(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    first, second = rows
    return [
        (first["prompt"], first["response_2"], first["response_1"]),
        (second["prompt"], second["response_1"], second["response_2"]),
    ]


def pairs_of(path: Path) -> list[tuple[str, str, str]]:
    return [(record["prompt"], record["chosen"], record["rejected"]) for record in verdicts(path)]


def test_a_file_with_a_column_of_strengths_is_read(
    judged: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    strengths = ("2", "-1")
    with Path("judged.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*judged[0], "preference_strength"])
        writer.writeheader()
        for row, strength in zip(judged, strengths, strict=True):
            writer.writerow(row | {"preference_strength": strength})
    assert pairs_of(Path("judged.csv")) == expected_pairs(judged)
    assert [record["margin"] for record in verdicts(Path("judged.csv"))] == [2, 1]
    capsys.readouterr()
    assert cli.main(["prepare", "--inspect", "judged.csv"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 rows kept, as comparisons 2" in printed
    assert "format: helpsteer2_pairs" in printed


def test_the_labelling_config_of_the_docs_shows_the_columns(judged: list[dict[str, Any]]) -> None:
    page = (RECIPES.parent / "docs" / "data.md").read_text(encoding="utf-8")
    (view,) = re.findall(r"```xml\n(.*?)```", page, re.S)
    *texts, pairwise = ElementTree.fromstring(view)
    names = ["prompt", "response_1", "response_2"]
    assert [(text.get("name"), text.get("value")) for text in texts] == [(name, f"${name}") for name in names]
    assert pairwise.get("toName") == "response_1,response_2"  # the left one is the first
    assert {*names} <= judged[0].keys()


def test_an_export_of_label_studio_is_read(judged: list[dict[str, Any]]) -> None:
    sides = ("right", "left")
    results = [[{"from_name": "better", "type": "pairwise", "value": {"selected": side}}] for side in sides]
    tasks = [
        {"id": i, "data": row, "annotations": [{"was_cancelled": False, "result": result}]}
        for i, (row, result) in enumerate(zip(judged, results, strict=True))
    ]
    Path("export.json").write_text(json.dumps(tasks))
    assert pairs_of(Path("export.json")) == expected_pairs(judged)
    about = {"annotation_id": 1, "annotator": 1, "lead_time": 3.5}
    flat = [row | about | {"better": [{"selected": side}]} for row, side in zip(judged, sides, strict=True)]
    Path("flat.json").write_text(json.dumps(flat))
    assert pairs_of(Path("flat.json")) == expected_pairs(judged)


def test_an_export_of_argilla_is_read(judged: list[dict[str, Any]]) -> None:
    winners = ("response_2", "response_1")
    fields = [{name: row[name] for name in ("prompt", "response_1", "response_2")} for row in judged]
    flat = [
        {"id": str(i), "_server_id": "s", **texts}
        | {"better.responses": [winner], "better.responses.users": ["u"]}
        | {"better.responses.status": ["submitted"]}
        for i, (texts, winner) in enumerate(zip(fields, winners, strict=True))
    ]
    assert pairs_of(jsonl(Path("flat.jsonl"), flat)) == expected_pairs(judged)
    order = [{"value": ["response_2", "response_1"], "status": "submitted"}]
    nested = [{"id": "1", "fields": fields[0], "responses": {"order": order}}]
    (record,) = verdicts(jsonl(Path("nested.jsonl"), nested))
    assert record["responses"] == [judged[0]["response_2"], judged[0]["response_1"]]
    assert record["ranks"] == [1, 2]
