"""The columns that reward functions read keep their values and types, in all splits."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy
import pyarrow as pa
import pytest
from datasets import List, Value, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import RawRow
from pipeline.errors import UserError
from pipeline.prepare.column_types import column_types
from tests.prepare.publishing import manifest, prepare, rows_of, write


def types_of(*values: Any) -> Any:
    """Return the type of a column with these values."""
    records = [{"prompt": "Q", "x": value} for value in values]
    items = [
        ParsedRecord("prompts", record, [RawRow("a.jsonl", line, record)])
        for line, record in enumerate(records, 1)
    ]
    return column_types(items)["x"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2.5, 1], pa.float64()),
        ([1, 2**63], pa.uint64()),
        ([None], pa.null()),
        ([True, False], pa.bool_()),
        ([[], None, [1], [None]], pa.list_(pa.int64())),
        ([[], []], pa.list_(pa.null())),
        ([[[1]], [[], [0.5]]], pa.list_(pa.list_(pa.float64()))),
        ([{"a": 1}, None, {"b": ["x"]}, {}], pa.struct({"a": pa.int64(), "b": pa.list_(pa.string())})),
        ([[{"a": None}], [{"a": "x"}]], pa.list_(pa.struct({"a": pa.string()}))),
        ([datetime.date(2026, 1, 1)], pa.date32()),
        ([b"a"], pa.binary()),
        ([Decimal("1.50"), Decimal("1000.1")], pa.decimal128(6, 2)),
    ],
)
def test_a_type_includes_all_values(values: list[Any], expected: Any) -> None:
    assert types_of(*values) == expected
    assert types_of(*reversed(values)).equals(expected) or pa.types.is_struct(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "b", 1], "a.jsonl:3: column 'x' is a whole number, but text in a.jsonl:1; make"),
        ([None, 0.5, True], "a.jsonl:3: column 'x' is true or false, but a number in a.jsonl:2; make"),
        ([["a"], "a"], "a.jsonl:2: column 'x' is text, but a list in a.jsonl:1; make"),
        ([[1, "a"]], "a.jsonl:1: column 'x' at [] is text, but a whole number in a.jsonl:1; make"),
        (
            [{"a": {"b": [1]}}, {"c": 2}, {"a": {"b": [{}]}}],
            "a.jsonl:3: column 'x' at a.b[] is an object, but a whole number in a.jsonl:1; make",
        ),
        ([1, b"a"], "a.jsonl:2: column 'x' is binary, but a whole number in a.jsonl:1; make"),
    ],
)
def test_values_of_two_types_are_an_error(values: list[Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        types_of(*values)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(
        "make the values of 'x' one type, or pass the column over with ignore: [x]"
    )


class Thing:
    def __repr__(self) -> str:
        return "a\nthing"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: "a", "b": 2}, " is an object with the key 1, of type int, "),
        ([{}, {"a": {None: 1}}], " at [].a is an object with the key None, of type NoneType, "),
        ({b"a": 1}, " is an object with the key b'a', of type bytes, "),
        ({3}, " is {3}, of type set, "),
        (numpy.array([1, 2]), " is array([1, 2]), of type ndarray, "),
        (numpy.array([[1], [2]]), " is array([[1], [2]]), of type ndarray, "),
        ({"a": Thing()}, " at a is a thing, of type Thing, "),
        (UUID(int=1), " is UUID('00000000-0000-0000-0000-000000000001'), of type UUID, "),
        (Decimal("1E+100"), " is Decimal('1E+100'), of type Decimal, "),
        (2**64, " is 18446744073709551616, of type int, "),
        (-(2**63) - 1, " is -9223372036854775809, of type int, "),
    ],
)
def test_a_value_that_no_column_holds_is_named_with_its_row_and_type(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        types_of(None, value)
    assert str(caught.value) == (
        f"a.jsonl:2: column 'x'{message}which no column holds; make 'x' text, numbers, lists, or objects "
        "with text as keys, or pass the column over with ignore: [x]"
    )


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ([2**63, -1], ""),
        ([-1, 2**63], ""),
        ([2**53 + 1, 0.5], ""),
        ([0.5, -(2**53) - 1], ""),
        ([[2**63], [-1]], " at []"),
        ([{"a": 0.5}, {"a": 2**60}], " at a"),
    ],
)
def test_numbers_that_no_type_holds_together_name_both_rows(values: list[Any], at: str) -> None:
    first, second = values
    if at:
        (first,), (second,) = (value.values() if isinstance(value, dict) else value for value in values)
    with pytest.raises((pa.ArrowException, OverflowError)):
        pa.array([first, second], pa.float64() if 0.5 in (first, second) else pa.uint64())
    with pytest.raises(UserError) as caught:
        types_of(0, *values) if not at else types_of(None, *values)
    assert str(caught.value) == (
        f"a.jsonl:3: column 'x'{at} is {second}, and no type of number holds it exactly beside {first} in "
        "a.jsonl:2; write the values of 'x' as text, or pass the column over with ignore: [x]"
    )


def test_the_largest_numbers_that_a_type_holds() -> None:
    for values, type_ in (([2**53, 0.5, -(2**53)], pa.float64()), ([2**64 - 1, 0], pa.uint64())):
        assert types_of(*values) == type_
        assert pa.array(values, type_).to_pylist() == values


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text("ab"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_a_type_is_that_of_arrow(values: list[Any]) -> None:
    try:
        expected = pa.array(values)
    except (pa.ArrowException, OverflowError):
        return  # Arrow also refuses a number that does not fit into a type
    try:
        found = types_of(*values)
    except UserError:
        pytest.fail("Arrow has a type for these values")
    assert pa.array(values, found).to_pylist() == expected.to_pylist()


NUMBERS = st.integers(-(2**65), 2**65) | st.sampled_from([2**53, 2**53 + 1, 2**63, 2**64, -1, 0.5])


@given(
    st.lists(VALUES | st.lists(NUMBERS, max_size=3), max_size=4) | st.lists(NUMBERS, min_size=1, max_size=4)
)
def test_a_type_holds_every_value(values: list[Any]) -> None:
    try:
        type_ = types_of(None, *values)
    except UserError:
        return
    assert len(pa.array(values, type_)) == len(values)


ROWS: list[Any] = [
    {"prompt": f"Q{n}", "answer": n, "share": n / 2, "tags": ["a"] * n, "meta": {"k": {"n": n}}, "no": None}
    for n in range(12)
]


def test_columns_are_published_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [{"question": "R", "gt": 0.5, "label": "x", "margin": "m", "system": "S"}]
    sources = [
        {"format": "prompts", "path": write(tmp_path / "a.jsonl", ROWS)},
        {
            "format": "prompts",
            "path": write(tmp_path / "b.jsonl", more),
            "columns": {"prompt": "question", "answer": "gt"},
            "values": {"task": "math"},
        },
    ]
    published = prepare(tmp_path, *sources)
    output = capsys.readouterr().out
    assert f"{tmp_path}/a.jsonl: columns kept for reward functions: answer, share, tags, meta, no\n" in output
    assert f"{tmp_path}/b.jsonl: columns kept for reward functions: label, margin, answer, task\n" in output
    assert "not read" not in output

    features = {split: part.features for split, part in load_from_disk(str(published / "prompts")).items()}
    assert features["train"] == features["validation"] == features["test"]
    del features["train"]["prompt"]  # messages, as one prompt has a system turn
    assert features["train"] == {
        "answer": Value("float64"),
        "share": Value("float64"),
        "tags": List(Value("string")),
        "meta": {"k": {"n": Value("int64")}},
        "no": Value("null"),
        "label": Value("string"),
        "margin": Value("string"),
        "task": Value("string"),
    }
    rows = {row["prompt"][-1]["content"]: row for row in rows_of(published, "prompts")}
    missing = {"label": None, "margin": None, "task": None}
    for row in ROWS:
        prompt = [{"role": "user", "content": row["prompt"]}]
        assert rows[row["prompt"]] == row | missing | {"prompt": prompt}
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "R"}]
    new = {"prompt": turns, "answer": 0.5, "label": "x", "margin": "m", "task": "math"}
    assert rows["R"] == dict.fromkeys(("share", "tags", "meta", "no")) | new


def test_a_column_of_two_types_leaves_the_published_records_alone(tmp_path: Path) -> None:
    sources = [
        {"format": "prompts", "path": write(tmp_path / f"{name}.jsonl", [{"prompt": name, "x": value}])}
        for name, value in (("a", 1), ("b", "1"))
    ]
    published = prepare(tmp_path, sources[0])
    before = (published / "manifest.json").read_bytes()
    with pytest.raises(
        UserError, match=r"b.jsonl:1: column 'x' is text, but a whole number in .*a.jsonl:1; make"
    ):
        prepare(tmp_path, *sources, force=True)
    assert (published / "manifest.json").read_bytes() == before
    ignored = prepare(tmp_path, sources[0], sources[1] | {"ignore": ["x"]}, force=True)
    assert sorted(row["x"] or 0 for row in rows_of(ignored, "prompts")) == [0, 1]


def test_a_value_of_a_map_that_no_column_holds_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map_to_values.py").write_text(
        "import numpy\n\n\n"
        "def to_array(row):\n    return {'prompt': row['prompt'], 'x': numpy.arange(row['n'])}\n\n\n"
        "def to_keys(row):\n    return {'prompt': row['prompt'], 'x': {row['n']: 1, 'a': 2}}\n"
    )
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "n": 2}, {"prompt": "a", "n": 2}])
    for name, problem in (
        ("to_array", r"array\(\[0, 1\]\), of type nd"),
        ("to_keys", "an object with the key 2"),
    ):
        source: dict[str, Any] = {"format": "prompts", "path": path, "map": f"map_to_values:{name}"}
        with pytest.raises(UserError, match=rf"^{path}:1: column 'x' is {problem}.*ignore: \[x\]$"):
            prepare(tmp_path, source)


def test_the_count_of_rows_with_one_prompt(tmp_path: Path) -> None:
    rows = [("Q", "a", 1), ("Q", "b", 1), ("Q", "a", 1), ("R", "a", 1), ("R", "a", 2)]
    path = tmp_path / "a.jsonl"
    write(path, [{"prompt": prompt, "style": style, "answer": answer} for prompt, style, answer in rows])
    published = prepare(tmp_path, {"format": "prompts", "path": str(path)})
    counts = manifest(published)["rows"]
    assert (counts["read"], counts["kept"]) == (5, 2)
    assert counts["quarantined"] == {"contradiction": 2, "duplicate": 1}
    assert [row["style"] for row in rows_of(published, "prompts")] == ["a", "b"]


def test_derived_prompts_have_no_columns_of_other_records(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": "a", "rejected": "b", "margin": 1.0, "tags": [n]} for n in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    published = prepare(tmp_path, {"format": "comparisons", "path": path})
    assert sorted(json.dumps(row) for row in rows_of(published, "prompts")) == [
        '{"prompt": "Q0"}', '{"prompt": "Q1"}', '{"prompt": "Q2"}',
    ]  # fmt: skip
