"""System and history columns become turns; columns that change what is said are refused, others are told."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Source
from pipeline.data.notes import reading_notes
from pipeline.data.readers import ParsedRecord, read_source
from pipeline.errors import UserError

Q = {"prompt": "Q", "completion": "a"}
SYSTEM = {"role": "system", "content": "Be kind."}
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}
EARLIER = [{"role": "user", "content": "P"}, {"role": "assistant", "content": "b"}]


def read(
    folder: Path, *rows: dict[str, Any], format: str = "demonstrations", **options: Any
) -> tuple[list[ParsedRecord], list[str]]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = Source(format=format, path=str(path), **options)
    items = read_source(source)
    return items, [note.removeprefix(f"{path}: ") for note in reading_notes(source, items)]


def outcome(item: ParsedRecord) -> Any:
    return item.fault.reason if item.fault else item.record["prompt"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (Q | {"system": "Be kind."}, [SYSTEM, USER]),
        (Q | {"system_prompt": "Be kind."}, [SYSTEM, USER]),
        (Q | {"history": [["P", "b"]]}, [*EARLIER, USER]),
        (Q | {"history": "[['P', 'b']]", "system": "Be kind."}, [SYSTEM, *EARLIER, USER]),
        (Q | {"history": EARLIER}, [*EARLIER, USER]),
        ({"messages": [USER, ANSWER], "system": "Be kind."}, [SYSTEM, USER]),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Be kind."}, [SYSTEM, USER]),
        ({"messages": [SYSTEM, USER, ANSWER], "history": [["P", "b"]]}, [SYSTEM, *EARLIER, USER]),
        (Q | {"system": "", "history": [], "tools": "[]", "images": [None]}, "Q"),
        (Q | {"system": None, "prompt": ""}, ""),
        (Q | {"system": "Be kind.", "prompt": ""}, ""),  # a system turn alone asks nothing
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Be short."}, "two-system-turns"),
        (Q | {"history": "We spoke before."}, "not-text"),
        (Q | {"history": [["P"]]}, "not-text"),
        (Q | {"history": "[['P', 'b'"}, "unreadable-list"),
        (Q | {"tools": [{"name": "f"}]}, "tool-calls"),
        (Q | {"Functions": "[{'name': 'f'}]"}, "tool-calls"),
        (Q | {"images": ["x.png"]}, "not-only-text"),
        (Q | {"audio": "x.wav"}, "not-only-text"),
    ],
)
def test_what_a_row_has_besides_its_prompt(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    (item,), _ = read(tmp_path, row)
    assert outcome(item) == prompt


def test_a_labelled_text_takes_a_system_turn(tmp_path: Path) -> None:
    row = {"text": "a", "label": 1, "system": "Be kind."}
    (item,), _ = read(tmp_path, row, format="labels")
    assert item.record == {"prompt": [SYSTEM], "completion": "a", "label": 1, "text": "a"}


def test_mapped_columns_decide(tmp_path: Path) -> None:
    row = {"history": "Q", "completion": "a", "persona": "Be kind.", "system": "model-7"}
    (item,), notes = read(tmp_path, row, columns={"prompt": "history", "system": "persona"})
    assert outcome(item) == [SYSTEM, USER]
    assert notes == ["columns that are not read: system"]
    (item,), notes = read(tmp_path, Q, values={"system": "Be kind."})
    assert (outcome(item), notes) == ([SYSTEM, USER], [])


def test_what_is_ignored_is_passed_over_and_not_told(tmp_path: Path) -> None:
    called = ANSWER | {"tool_calls": [{"name": "f"}], "mood": "calm"}
    row = {"messages": [USER, called], "tools": [{"name": "f"}], "system": "Be kind.", "id": 3}
    items, notes = read(tmp_path, row, ignore=["tools", "tool_calls", "system", "id"])
    assert items[0].record["completion"] == [ANSWER | {"mood": "calm"}]
    assert outcome(items[0]) == [USER]
    assert notes == ["keys of messages that are not read: mood 1"]
    with pytest.raises(
        UserError, match=r"ignore names 'tool', found messages, tools, .* did you mean 'tools'"
    ):
        read(tmp_path, row, ignore=["tool"])


def test_what_was_not_read_is_told(tmp_path: Path) -> None:
    rows = [Q | {"system": "Be kind.", "id": n, "empty": None, "instruction": "I"} for n in range(2)]
    _, notes = read(tmp_path, *rows)
    assert notes == [
        "column system is read as the system turn; ignore: [system] passes it over",
        "columns that are not read: id, instruction",
    ]
    _, notes = read(tmp_path, *rows, columns={"prompt": "instruction"}, ignore=["id"])
    assert notes[1:] == ["columns that are not read: prompt"]
    assert read(tmp_path, Q)[1] == []
