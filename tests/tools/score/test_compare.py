"""Responses to one prompt, listed best first."""

from pathlib import Path

import pytest

from pipeline import RewardModel, cli


def test_answers_to_a_prompt_are_listed_best_first(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    answers = ["An apple.", "x=y", "界" * 40, "two\nlines " + "and more " * 9, "--debug"]
    assert cli.main(["compare", "--reward", str(model), "--", "Name a fruit.", *answers]) == 0
    head, *lines, note = capsys.readouterr().out.splitlines()
    assert note == "  over max_length=96, cut: 1 of 5"
    opened = RewardModel.load(model)
    scores = opened.score(["Name a fruit."] * 5, answers)
    ranked = opened.rank("Name a fruit.", answers)
    assert [line.split()[:2] for line in lines] == [
        [str(rank), f"{scores[i]:.4f}"] for rank, i in enumerate(ranked, 1)
    ]
    start = head.index("response")
    shown = {i: line[start:] for i, line in zip(ranked, lines, strict=True)}
    room = 40 - start
    assert (shown[0], shown[1], shown[4]) == ("An apple.", "x=y", "--debug")
    assert shown[2] == "界" * ((room - 1) // 2) + "…"
    assert shown[3] == ("two lines " + "and more " * 9)[: room - 1] + "…"


def test_compare_can_leave_out_what_it_cannot_read_whole(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", "--reward", str(model), "--overlong", "drop", "Name a fruit."]
    assert cli.main([*argv, "An apple.", "word " * 200]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(lines), lines[-1]] == [3, "  over max_length=96, left out: 1 of 2"]
    assert cli.main([*argv, "word " * 200]) == 2
    assert "compare: every response is over max_length=96" in capsys.readouterr().err
