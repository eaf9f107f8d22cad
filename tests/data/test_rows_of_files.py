"""Rows of CSV, TSV and JSON files, by hand-made examples, and those that are unreadable by their line."""

import json
from pathlib import Path

import datasets
import pytest

from pipeline.errors import UserError
from tests.data.reading import faults, read, records


def test_csv_with_bom_crlf_and_newlines_in_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"two\r\nlines, ""quoted""",a\r\n\r\n\xc3\xa9,b\r\n')
    items = read("demonstrations", path)
    assert [item.record for item in items] == [
        {"prompt": 'two\r\nlines, "quoted"', "completion": "a"},
        {"prompt": "é", "completion": "b"},
    ]
    assert [item.rows[0].line for item in items] == [2, 5]


@pytest.mark.parametrize(
    ("text", "line"),
    [('Q,a\nR,"x"y\nS,d\n', 3), ('Q,a\nR,b\nS,"never closed\nT,d\n', 4), ('Q,"a \\" b,\nc"\n', 2)],
)
def test_a_stray_quote_in_csv_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + text, encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"a\.csv:{line}: not valid CSV from here on: .*; close the quotes of each field"
    ):
        read("demonstrations", path)


def test_unreadable_csv_rows_are_quarantined_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\nQ,a\nonly one\nQ,b,c\nS,d\n", encoding="utf-8")
    items = read("demonstrations", path)
    assert faults(items) == [(3, "unreadable-line"), (4, "unreadable-line")]
    assert items[1].fault
    assert items[1].fault.detail == "expected 2 fields, found 1"
    assert [item.record["prompt"] for item in items if not item.fault] == ["Q", "S"]


def test_a_long_csv_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(records("prompts", tmp_path / "a.csv")[0]["prompt"]) == 200_000


def test_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\nQ, and\ta\n", encoding="utf-8")
    assert records("demonstrations", tmp_path / "a.tsv") == [{"prompt": "Q, and", "completion": "a"}]


def test_unreadable_json_lines_are_quarantined_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b"}\n\n{"prompt": \n["Q"]\n{"prompt": "c"}\n', encoding="utf-8")
    items = read("prompts", path)
    assert faults(items) == [(3, "unreadable-line"), (4, "unreadable-line")]
    assert [item.record["prompt"] for item in items if not item.fault] == ["a\u2028b", "c"]
    assert items[1].rows[0].data == '{"prompt": '


def test_json_is_an_array_or_an_object_per_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "Q"}, {"prompt": "R"}, 3]', encoding="utf-8")
    items = read("prompts", tmp_path / "a.json")
    assert [item.record for item in items[:2]] == [{"prompt": "Q"}, {"prompt": "R"}]
    assert faults(items) == [(3, "unreadable-line")]
    (tmp_path / "b.json").write_text('{"prompt": "Q"}\n{"prompt": "R"}\n', encoding="utf-8")
    assert records("prompts", tmp_path / "b.json") == [{"prompt": "Q"}, {"prompt": "R"}]


def test_a_value_that_cannot_be_read_is_a_fault_of_its_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    latin = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": latin}), tmp_path / "a.parquet")
    (item,) = read("prompts", tmp_path / "a.parquet")
    assert item.fault
    assert (item.fault.reason, item.rows[0].data) == ("unreadable-value", {"prompt": None})
    assert item.fault.detail.startswith("prompt: 'utf-8' codec")
    far = pyarrow.array([2**40], type=pyarrow.timestamp("s"))
    datasets.Dataset(pyarrow.table({"prompt": ["Q"], "when": far})).save_to_disk(tmp_path / "far")
    (item,) = read("prompts", tmp_path / "far")
    assert item.fault
    assert (item.fault.reason, item.rows[0].data) == ("unreadable-value", {"prompt": "Q", "when": None})
    assert item.fault.detail.endswith("; drop that column, or save it as text")


def test_a_list_in_a_cell_that_is_nested_too_deeply_is_a_fault(tmp_path: Path) -> None:
    deep = "[" * 5_000 + "]" * 5_000
    rows = [{"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2]}, {"prompt": "P", "responses": deep}]
    (path := tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, faulty = read("rankings", path)
    assert kept.fault is None
    assert faulty.fault is not None
