"""Rows that cannot be scored, or not as a whole."""

from pathlib import Path

import pytest

from pipeline import RewardModel
from tests.models.manners import save_llama
from tests.tools.score.commands import ROWS, jsonl, left, main, refusal, rows_of


def test_a_bad_row_is_quarantined_with_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        '{"text": ""}',
        '{"text": " \\n"}',
        '{"text": 5}',
        "{torn",
        '{"prompt": 3, "text": "a"}',
        '{"prompt": "a"}',
        "[1]",
        '{"text": "\\ud800"}',
    ]
    source = tmp_path / "in.jsonl"
    source.write_text(
        "\r\n".join(['{"text": "first"}', *bad, "", '{"prompt": null, "text": "last"}']), encoding="utf-8"
    )
    assert main("score", model, source, "out.jsonl") == 0
    assert [row["text"] for row in rows_of(Path("out.jsonl"))] == ["first", "last"]
    entries = rows_of(Path("out.jsonl.quarantine.jsonl"))
    assert [list(entry) for entry in entries] == [["source", "line", "reason", "detail", "row"]] * 8
    assert [(entry["line"], entry["reason"]) for entry in entries] == [
        (2, "empty-text"),
        (3, "empty-text"),
        (4, "not-text"),
        (5, "unreadable-line"),
        (6, "not-text"),
        (7, "not-text"),
        (8, "unreadable-line"),
        (9, "not-unicode"),
    ]
    assert (entries[0]["row"], entries[3]["row"], entries[3]["source"]) == (
        {"text": ""},
        "{torn",
        str(source),
    )
    assert capsys.readouterr().out.splitlines() == [
        "  quarantined: empty-text 2, not-text 3, not-unicode 1, unreadable-line 2; see "
        "out.jsonl.quarantine.jsonl",
        "2 rows written, 8 quarantined: out.jsonl",
    ]
    jsonl(source, [{"text": "good"}])
    assert main("score", model, source, "out.jsonl", "--force") == 0
    assert left(tmp_path) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("overlong", [None, "truncate_left", "truncate_right", "drop"])
def test_rows_that_are_cut_are_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overlong: str | None
) -> None:
    source = jsonl(tmp_path / "in.jsonl", ROWS)
    options = ["--overlong", overlong] if overlong else []
    assert main("score", model, source, "out.jsonl", *options) == 0
    printed = capsys.readouterr()
    assert f"over max_length=96 (overlong: {overlong or 'truncate_left'}): 1 of 7" in printed.out
    assert "were cut" not in printed.err  # it is told once
    found = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [1, 2, 3, 4, 5, 6, *([] if overlong == "drop" else [7])]
    if overlong == "drop":
        (fault,) = rows_of(tmp_path / "out.jsonl.quarantine.jsonl")
        assert (fault["reason"], fault["detail"], fault["line"]) == ("overlong", "over max_length=96", 7)
    elif overlong:
        side = overlong.removeprefix("truncate_")
        opened = RewardModel.load(model, encoding={"truncation": side})
        assert found[-1]["reward"] == pytest.approx(
            opened.score_response(ROWS[-1]["prompt"], ROWS[-1]["response"]), abs=1e-5
        )


def test_a_row_that_a_template_refuses_is_quarantined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward_model = save_llama(tmp_path / "rm", "gemma", labels=1)
    policy = save_llama(tmp_path / "policy", "gemma")
    refused = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": prompt, "response": "A"} for prompt in ("Q", refused)])
    assert main("score", reward_model, source, "out.jsonl") == 0
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Q"}, {"prompt": refused}])
    sampling = ("--policy", str(policy), "--n", "2", "--response-tokens", "3")
    assert main("best-of-n", reward_model, prompts, "best.jsonl", *sampling) == 0
    assert capsys.readouterr().out.count("1 rows written, 1 quarantined") == 2
    for output in ("out.jsonl", "best.jsonl"):
        (fault,) = rows_of(tmp_path / f"{output}.quarantine.jsonl")
        assert (fault["reason"], fault["line"]) == ("refused", 2)
        assert "refuses the conversation (system, user" in fault["detail"]

    alone = jsonl(tmp_path / "alone.jsonl", [{"prompt": refused, "response": "A"}])
    assert refusal(capsys, "score", reward_model, alone, "none.jsonl").startswith(
        f"error: {alone}: no row is left to score; line 1: the chat template refuses"
    )
