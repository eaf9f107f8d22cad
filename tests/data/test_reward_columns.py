"""Columns beside a prompt are read for reward functions, unless they are something else."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Source
from pipeline.data.notes import reading_notes
from pipeline.data.reward_columns import ARGUMENTS
from pipeline.errors import UserError
from pipeline.reward import calls
from tests.data.reading import faults, jsonl, read, user

OTHERS = {
    "answer": 7,
    "chosen": "[1",  # of another kind of records: no text of a list here
    "responses": "[1, 2]",
    "messages": [{"role": "user", "tools": []}],
    "reasoning": "a",
    "text": "['a']",
}


def parsed(folder: Path, *rows: dict[str, Any], **options: Any) -> tuple[list[Any], list[str]]:
    """Return the records of prompts, and what is printed about their source."""
    path = jsonl(folder / "a.jsonl", list(rows))
    items = read("prompts", path, **options)
    notes = reading_notes(Source(format="prompts", path=str(path), **options), items)
    assert not faults(items)
    return [item.record for item in items], [note.removeprefix(f"{path}: ") for note in notes]


def test_other_columns_are_kept_as_they_are(tmp_path: Path) -> None:
    rows = [{"prompt": "Q"} | OTHERS, {"prompt": "R", "extra": None}]
    records, notes = parsed(tmp_path, *rows, ignore=["tools"])
    assert records == rows
    names = "answer, chosen, responses, messages, reasoning, text, extra"
    assert notes == [f"columns kept for reward functions: {names}"]


def test_what_is_read_as_something_else_is_not_kept(tmp_path: Path) -> None:
    row = {"prompt": "Q", "system": "S", "system_prompt": "T", "tools": [], "": 0, "id": 3, "kept": 1}
    records, notes = parsed(tmp_path, row, ignore=["id"])
    assert records == [{"prompt": [{"role": "system", "content": "S"}, user("Q")], "kept": 1}]
    assert notes[1:] == [
        "columns kept for reward functions: kept",
        "columns that are not read: system_prompt, ",
    ]


def test_columns_get_the_names_that_they_are_mapped_to(tmp_path: Path) -> None:
    row = {"question": "Q", "gt": 7, "answer": 8, "a": "x", "b": "y", "tools": "wrench", "task": "old"}
    columns = {"prompt": "question", "answer": "gt", "both": ["a", "b"], "tool": "tools"}
    records, notes = parsed(tmp_path, row, columns=columns, values={"task": "math"})
    assert records == [{"prompt": "Q", "answer": 7, "both": "x\n\ny", "tool": "wrench", "task": "math"}]
    assert notes == [
        "columns kept for reward functions: answer, both, tool, task",
        "columns that are not read: answer, task",
    ]


def test_several_columns_are_joined_only_if_they_are_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "a": "x", "b": 1}])
    (item,) = read("prompts", path, columns={"both": ["a", "b"]})
    assert str(item.fault) == "not-text: both: expected text to join, found int"


def test_a_csv_file_has_text_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer,tags\nQ,007,\n", encoding="utf-8")
    (item,) = read("prompts", tmp_path / "a.csv")
    assert item.record == {"prompt": "Q", "answer": "007", "tags": ""}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_column_named_as_an_argument_of_reward_functions(tmp_path: Path, name: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", name: 1}])
    with pytest.raises(UserError) as caught:
        read("prompts", path)
    assert str(caught.value) == (
        f"{path}: format prompts: column '{name}': reward functions have an argument of this name, so the "
        f"column cannot reach them; rename it with columns, or pass it over with ignore: [{name}]"
    )
    with pytest.raises(UserError, match=f"column '{name}'"):
        read("prompts", path, columns={name: "prompt"}, ignore=[name])
    assert read("prompts", path, ignore=[name])[0].record == {"prompt": "Q"}
    assert read("prompts", path, columns={"mine": name})[0].record == {"prompt": "Q", "mine": 1}
    assert {*calls.OF_TRAINERS, "prompts", "completions", "completion_ids", "ended"} <= set(ARGUMENTS)
