"""Runs that are interrupted, repeated or changed: an interruption changes no byte."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.tools.score import chunks
from tests.tools.score.commands import (
    PARTIAL,
    PROMPTS,
    ROWS,
    interrupted,
    jsonl,
    left,
    main,
    refusal,
)


@pytest.fixture(params=["score", "best-of-n"])
def run(request: pytest.FixtureRequest, model: Path, tiny_gpt2: Path) -> Callable[..., int]:
    """One command, always the same but for what is given."""
    more = {
        "score": ["--alpha=3"],
        "best-of-n": ["--policy", str(tiny_gpt2), "--n=2", "--response-tokens=4", "--seed=3"],
    }[request.param]
    source = jsonl(Path("in.jsonl"), (ROWS if request.param == "score" else PROMPTS)[:5])
    return lambda *others: main(request.param, model, source, "out.csv", *more, *others)


@pytest.fixture
def partial(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The whole of a run's partial file; the output is there too."""
    states: list[bytes] = []
    publish = chunks.publish
    with monkeypatch.context() as patched:
        patched.setattr(
            chunks, "publish", lambda *given: (states.append(PARTIAL.read_bytes()), publish(*given))
        )
        assert run() == 0
    return states[0]


def test_cut_anywhere_it_ends_in_the_same_bytes(
    run: Callable[..., int], partial: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path("out.csv").read_bytes()
    ends = [i + 1 for i, byte in enumerate(partial) if byte == ord("\n")]
    done = set()
    for cut in (3, ends[0] - 1, ends[0], ends[0] + 5, ends[1], ends[-2], ends[-1] - 1, ends[-1]):
        finished = sum(
            len(json.loads(line)) for line in partial[:cut].splitlines()[1 : sum(end <= cut for end in ends)]
        )
        PARTIAL.write_bytes(partial[:cut])
        Path("out.csv").unlink()
        capsys.readouterr()
        assert run() == 0
        assert (f"resuming {PARTIAL}: {finished} of 5 rows are done" in capsys.readouterr().out) == (
            finished > 0
        )
        assert Path("out.csv").read_bytes() == whole
        done.add(finished)
        assert left(Path()) == ["in.jsonl", "out.csv"]
    assert done > {0, 5}
    assert len(done) > 3


def test_what_was_replaced_stays_until_the_new_one_is_whole(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out.csv").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        assert run("--force") == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert Path("out.csv").read_text() == "old"
    assert run("--force") == 0
    assert f"resuming {PARTIAL}: 5 of 5 rows are done" in capsys.readouterr().out
    assert left(Path()) == ["in.jsonl", "out.csv"]


@pytest.mark.parametrize(
    ("more", "rows", "named"),
    [(("--alpha=2",), 6, "alpha"), ((), 4, "input"), (("--normalize",), 6, "normalize")],
)
def test_what_was_made_from_something_else_is_not_gone_on_from(
    more: Any,
    rows: int,
    named: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path("in.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(chunks, "publish", interrupted)
        assert main("score", model, jsonl(source, ROWS[:6]), "out.csv") == 130
    capsys.readouterr()
    jsonl(source, ROWS[:rows])
    assert main("score", model, source, "out.csv", *more) == 0
    assert (
        capsys.readouterr().out.splitlines()[0] == f"{PARTIAL}: was made with another {named}; starting over"
    )
    assert main("score", model, source, "clean.csv", *more) == 0
    assert Path("out.csv").read_bytes() == Path("clean.csv").read_bytes()


def test_the_same_command_given_again_is_done(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    before = Path("out.csv").read_bytes()
    PARTIAL.write_bytes(b'{"command": ')  # as a kill before the last deletion leaves it
    with monkeypatch.context() as patched:
        patched.setattr(chunks, "publish", interrupted)  # nothing is computed or written again
        capsys.readouterr()
        assert run() == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(": unchanged, keeping out.csv")
        assert left(Path()) == ["in.jsonl", "out.csv"]
        assert run("--force") == 130
    PARTIAL.unlink()
    Path("out.csv").write_bytes(before + b"more\n")
    assert run() == 2
    assert "--output out.csv: exists already; name another file, or add --force" in capsys.readouterr().err
    assert Path("out.csv").read_bytes() == before + b"more\n"


def test_an_output_of_other_settings_is_not_replaced(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(Path("in.jsonl"), [{"text": "good"}, {"text": ""}])
    assert main("score", model, source, "out.csv") == 0
    before = {name: Path(name).read_bytes() for name in left(Path())}
    assert (
        refusal(capsys, "score", model, source, "out.csv", "--alpha=2")
        == "error: --output out.csv: exists already, and was made with another alpha; name another file, "
        "or add --force to replace it"
    )
    assert {name: Path(name).read_bytes() for name in left(Path())} == before
    assert main("score", model, source, "out.csv", "--alpha=2", "--force") == 0
    assert Path("out.csv").read_bytes() != before["out.csv"]


@pytest.mark.parametrize("line", ["[1]", '{"reward": 1}', '[{"reward": 1, "more": 2}]', "[" * 100_000])
def test_a_line_that_no_run_wrote_is_computed_again(line: str, model: Path) -> None:
    source = jsonl(Path("in.jsonl"), ROWS[:5])
    assert main("score", model, source, "whole.csv") == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunks, "publish", interrupted)
        assert main("score", model, source, "out.csv") == 130
    head, first, *_ = PARTIAL.read_text().splitlines()
    PARTIAL.write_text("\n".join([head, first, line, first, first, ""]))
    assert main("score", model, source, "out.csv") == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
