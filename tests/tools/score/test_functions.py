"""A reward that is a function: it gets the other columns of the rows, and a model's options are refused."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from tests.tools.score.commands import jsonl, main, refusal, rows_of

ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a fruit.", "response": "An apple.", "answer": "apple"},
    {"prompt": "Name a fruit.", "response": "A stone.", "answer": "pear", "note": 3},
    {"prompt": [{"role": "user", "content": "Why?"}], "response": "Because.", "answer": "B"},
]
CODE = """
def contains(prompts, completions, answer, note, **others):
    assert "response" not in others
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(a in text) + (n or 0) for a, text, n in zip(answer, texts, note)]

def tokens(prompts, completions, completion_ids, ended, **columns):
    return [[1.0] * len(ids) for ids in completion_ids]

def place(prompts, number, **others):
    return number

def fails(**columns):
    return ["high" for _ in columns["prompts"]]
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `scorers` of the test's own."""
    (tmp_path / "scorers.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("scorers", None)


def test_score_gives_the_function_the_other_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv: Any = ("score", "scorers:contains", jsonl(tmp_path / "in.jsonl", ROWS), "out.jsonl")
    assert main(*argv) == 0
    assert [row["reward"] for row in rows_of(Path("out.jsonl"))] == [1.0, 3.0, 1.0]
    assert "completion_ids" not in capsys.readouterr().out
    assert main(*argv) == 0
    assert "score: unchanged, keeping out.jsonl" in capsys.readouterr().out
    (tmp_path / "scorers.py").write_text(CODE + "# another version")
    assert refusal(capsys, *argv).startswith(
        "error: --output out.jsonl: exists already, and was made with an"
    )


def test_a_text_has_no_token_ids_and_a_function_that_names_them_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("score", Path("scorers:tokens"), jsonl(tmp_path / "in.jsonl", ROWS), "out.jsonl") == 0
    assert [row["reward"] for row in rows_of(Path("out.jsonl"))] == [0.0, 0.0, 0.0]
    note = "score: scorers:tokens gets empty completion_ids, because a text has no token ids\n"
    assert capsys.readouterr().out.startswith(note)


def test_best_of_n_scores_the_tokens_that_were_sampled(tmp_path: Path, tiny_gpt2: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": "Name a fruit.", "number": n} for n in (4, 5)])
    argv = ("--policy", str(tiny_gpt2), "--n", "3", "--response-tokens", "2", "--force")
    for name, expected in (("place", [4.0, 5.0]), ("tokens", [2.0, 2.0])):
        assert main("best-of-n", Path(f"scorers:{name}"), source, "out.jsonl", *argv) == 0
        assert [row["reward"] for row in rows_of(Path("out.jsonl"))] == expected


def test_compare_ranks_by_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--reward", "scorers:place", "Hi.", "A.", "B."]) == 2
    error = "--reward (scorers:place): the reward cannot be called: place() missing 1"
    assert error in capsys.readouterr().err
    reward = "pipeline.prepare.demo:well_formed"
    good = "The capital of France is Paris."
    assert cli.main(["compare", "--reward", reward, "What is the capital of France?", "x", good]) == 0
    ranked = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(None, 2) for line in ranked] == [["1", "1.0000", good], ["2", "0.0000", "x"]]


@pytest.mark.parametrize(
    ("name", "rows", "more", "expected"),
    [
        ("contains", ROWS, ["--alpha", "2"], "--alpha: is only read with a reward model, but scorers:con"),
        ("contains", ROWS, ["--normalize"], "--normalize: is only read with a reward model"),
        ("contains", ROWS, ["--overlong", "drop"], "--overlong: is only read with a reward model"),
        ("contains", ROWS, ["--positive-label", "a"], "--positive-label: is only read with a reward model"),
        ("nothing", ROWS, [], "--reward (scorers:nothing): module 'scorers' has no attribute 'nothing'"),
        ("fails", ROWS, [], "--reward (scorers:fails): "),
        ("tokens", [{"prompt": "a", "completions": ["b", "c"]}], [], "'completions' has the steps of"),
    ],
)
def test_what_a_function_cannot_read_is_refused(
    name: str,
    rows: list[Any],
    more: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(
        capsys, "score", Path(f"scorers:{name}"), jsonl(tmp_path / "in.jsonl", rows), "o.csv", *more
    )
    assert expected in line
    assert not Path("o.csv").exists()
