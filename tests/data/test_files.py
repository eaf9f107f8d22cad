"""Forms of files by hand-made examples, rows that cannot be read by their reason, arrays by a round trip."""

import bz2
import codecs
import gzip
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pipeline.config import Source
from pipeline.data import json_rows, text_files
from pipeline.data.files import find_reader
from pipeline.data.quarantine import count_and_quarantine
from pipeline.data.readers import read_source
from pipeline.data.schema import RawRow
from pipeline.data.validation import validate_records
from pipeline.errors import UserError

ROWS = [{"prompt": "Q", "completion": "é, 界"}, {"prompt": "R", "completion": "b"}]
CSV = 'prompt,completion\nQ,"é, 界"\nR,b\n'
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path: Path, content: bytes) -> list[RawRow]:
    path.write_bytes(content)
    reader = find_reader(path)
    assert reader
    return list(reader(path))


def rows(path: Path, content: bytes) -> list[Any]:
    found = read(path, content)
    assert [row.fault for row in found if row.fault] == []
    return [row.data for row in found]


def reasons(found: list[RawRow]) -> list[str | None]:
    return [row.fault.reason if row.fault else None for row in found]


# Forms


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + CSV.encode(),
        CSV.encode("utf-16"),
        codecs.BOM_UTF16_BE + CSV.encode("utf-16-be"),
        CSV.encode("utf-32"),
        CSV.replace("\n", "\r\n").encode(),
        CSV.replace("\n", "\r").encode(),
        CSV.replace("prompt,completion", " prompt , completion ").encode(),
        ("sep=;\n" + 'prompt;completion\nQ;"é, 界"\nR;b\n').encode(),
        b'prompt;completion\nQ;"\xc3\xa9, \xe7\x95\x8c"\nR;b\n',
        "prompt\tcompletion\nQ\té, 界\nR\tb\n".encode("utf-16"),
        b'prompt, completion\nQ, "\xc3\xa9, \xe7\x95\x8c"\nR, b\n',
    ],
)
def test_a_table_is_read_in_every_form(tmp_path: Path, content: bytes) -> None:
    assert rows(tmp_path / "a.csv", content) == ROWS
    assert rows(tmp_path / "a.txt", content) == ROWS


def compress_zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", compress_zstd)],
)
def test_a_compressed_file_is_read_and_a_damaged_one_is_told(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    content = compress(JSONL.encode())
    assert rows(tmp_path / f"a.jsonl{suffix}", content) == ROWS
    assert rows(tmp_path / f"a.csv{suffix}", compress(CSV.encode("utf-16"))) == ROWS
    assert rows(tmp_path / "a.jsonl", content) == ROWS  # the name may not say it
    with pytest.raises(UserError, match=r"a\.jsonl.* is damaged or cut: .*; copy it again"):
        read(tmp_path / f"a.jsonl{suffix}", content[:-6])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (CSV.encode("utf-16-le"), "found zero bytes, as UTF-16 without a byte order mark has"),
        (b"PK\x03\x04rest", "found a ZIP archive, as an Excel workbook is"),
        (b"PAR1rest", "found Parquet"),
        (CSV.encode("utf-16")[:-1], "is damaged or cut: .*truncated data"),
    ],
)
def test_one_line_says_what_is_no_text(tmp_path: Path, content: bytes, what: str) -> None:
    with pytest.raises(UserError, match=rf"a\.csv: .*{what}"):
        read(tmp_path / "a.csv", content)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_json_is_lines_or_arrays_whatever_its_name(tmp_path: Path, name: str) -> None:
    array = json.dumps(ROWS, indent=1)
    for content in (JSONL, JSONL.replace("\n", "\r\n"), array, json.dumps(ROWS)):
        assert rows(tmp_path / name, content.encode()) == ROWS
        assert rows(tmp_path / name, content.encode("utf-16")) == ROWS
        assert rows(
            tmp_path / name, b"\xef\xbb\xbf" + content.encode() + b"\xef\xbb\xbf" + content.encode()
        ) == [
            *ROWS,
            *ROWS,
        ]
    assert rows(tmp_path / name, b"") == []


# Rows that cannot be read

UNREADABLE = {
    "[" * 600 + "]" * 600: "unreadable-line",
    "[" * 100_000 + "]" * 100_000: "unreadable-line",
    "[" * 100 + "]" * 100: "unreadable-line",
    "[" * 99 + "]" * 99: None,
    "1" * 5000: "unreadable-line",
    '{"a": 1, "a": 2}': "repeated-key",
    "NaN": None,
    '"\\udce9"': None,
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_row_that_cannot_be_read_hides_no_other(tmp_path: Path, name: str) -> None:
    lines = ['{"prompt": "Q"}', *(f'{{"x": {value}}}' for value in UNREADABLE), '{"prompt": "R"}']
    content = "\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]"
    found = read(tmp_path / name, content.encode())
    assert reasons(found) == [None, *UNREADABLE.values(), None]
    assert found[-1].data == {"prompt": "R"}
    assert max(len(str(row.data)) for row in found) < 11_000  # a preview


def test_a_key_or_a_column_given_twice_is_named(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "a.jsonl", b'{"prompt": "Q", "prompt": "R"}')
    assert row.fault
    assert row.fault.detail == "the key 'prompt' is given twice"
    (row,) = read(tmp_path / "a.csv", b"prompt,prompt \nQ,R\n")
    assert (row.data, row.fault and row.fault.detail) == (["Q", "R"], "the column 'prompt' is given twice")
    assert rows(tmp_path / "a.csv", b"prompt,,\nQ,1,2\n") == [{"prompt": "Q", "": "1", "column 3": "2"}]


def test_a_header_in_mid_file_is_no_row(tmp_path: Path) -> None:
    part = codecs.BOM_UTF8 + CSV.encode()
    found = read(tmp_path / "a.csv", part + part)
    assert [(row.line, row.fault and row.fault.reason) for row in found] == [
        (2, None),
        (3, None),
        (4, "repeated-header"),
        (5, None),
        (6, None),
    ]


def test_parquet_rows_are_faulty_one_by_one(tmp_path: Path) -> None:
    text = pyarrow.array([b"Q", b"caf\xe9", b"R"]).view(pyarrow.string())
    twice = pyarrow.StructArray.from_arrays([pyarrow.array([1, 2, 3])] * 2, names=["a", "a"])
    keys = pyarrow.array([[(1, "x")], [], None], pyarrow.map_(pyarrow.int64(), pyarrow.string()))
    cost = pyarrow.array([Decimal("1.5")] * 3)
    parquet.write_table(pyarrow.table({"prompt": text, "keys": keys, "cost": cost}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert reasons(found) == [None, "unreadable-value", None]
    assert found[0].data == {"prompt": "Q", "keys": [(1, "x")], "cost": Decimal("1.5")}
    parquet.write_table(pyarrow.table({"prompt": text, "twice": twice}), tmp_path / "b.parquet")
    found = read(tmp_path / "b.parquet", (tmp_path / "b.parquet").read_bytes())
    assert reasons(found) == ["unreadable-value"] * 3
    assert found[0].fault
    assert found[0].fault.detail.startswith("twice: Converting")
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["Q"]), pyarrow.array(["R"])], names=["prompt", "prompt"]
    )
    parquet.write_table(table, tmp_path / "c.parquet")
    assert reasons(read(tmp_path / "c.parquet", (tmp_path / "c.parquet").read_bytes())) == ["repeated-key"]


# Length


def test_a_line_that_is_too_long_is_read_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (text_files, json_rows):
        monkeypatch.setattr(module, "MAX_CHARS", 50)
    monkeypatch.setattr(json_rows, "CHUNK_CHARS", 10)
    long = json.dumps({"prompt": "x" * 200})
    found = read(tmp_path / "a.jsonl", f'{{"prompt": "Q"}}\n{long}\n{{"prompt": "R"}}\n'.encode())
    assert reasons(found) == [None, "unreadable-line", None]
    assert found[1].data == long[:51]
    with pytest.raises(UserError, match=r"a\.json: not valid JSON after row 0: an element is longer than 50"):
        read(tmp_path / "a.json", f"[{long}]".encode())


def test_a_csv_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_CHARS", 50)
    monkeypatch.setattr("pipeline.data.files.MAX_CHARS", 50)
    with pytest.raises(UserError, match=r"a\.csv:2: a line is longer than 50 characters"):
        read(tmp_path / "a.csv", b"prompt\n" + b"x" * 60 + b"\n")


# Any bytes

PAIRS = [{"prompt": f"Q{n}", "chosen": "é", "rejected": "b"} for n in range(4)]
TABLE = "prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in PAIRS)
PARQUET = pyarrow.BufferOutputStream()
parquet.write_table(pyarrow.Table.from_pylist(PAIRS), PARQUET, compression="none")
CONTENTS = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS).encode(),
    "a.json": json.dumps(PAIRS).encode(),
    "a.csv": TABLE.encode(),
    "b.csv": TABLE.encode("utf-16"),
    "a.tsv": TABLE.replace(",", "\t").encode(),
    "a.csv.gz": gzip.compress(TABLE.encode()),
    "a.parquet": PARQUET.getvalue().to_pybytes(),
}
PIECES = [
    b'"',
    b"{",
    b"]",
    b",",
    b"\\",
    b"\n",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"NaN",
    b"9" * 5000,
]
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 9), st.sampled_from([b"", *PIECES]) | st.binary(max_size=3)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(CONTENTS)), EDITS)
def test_any_change_of_a_file_is_rows_or_one_line(
    tmp_path: Path, name: str, edits: list[tuple[float, int, bytes]]
) -> None:
    content = bytearray(CONTENTS[name])
    for place, length, piece in edits:
        start = int(place * len(content))
        content[start : start + length] = piece
    path = tmp_path / name
    path.write_bytes(content)
    source = Source(format="comparisons", path=str(path))
    message = ""
    try:
        items = read_source(source)
    except UserError as error:
        items, message = [], str(error)
    assert "\n" not in message
    validate_records(items, [])
    counts = count_and_quarantine(((item.rows[0], item.fault) for item in items), tmp_path / "q.jsonl")
    entries = (tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(set(json.loads(entry)) == {"source", "line", "reason", "detail", "row"} for entry in entries)
    assert counts["kept"] + counts["merged"] + len(entries) == counts["read"] == len(items)


# Arrays

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(['"', "\\", "],[", "}{"]),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=8,
)


def in_pieces(text: str, size: int) -> Callable[[int], str]:
    """Return a `read` that gives at most `size` characters at a time."""
    starts = iter(range(0, len(text), size))
    return lambda _: next((text[start : start + size] for start in starts), "")


@given(st.lists(JSON, max_size=5), st.sampled_from([None, 1]), st.integers(1, 40), st.booleans())
def test_an_array_is_split_into_its_elements(
    values: list[Any], indent: int | None, size: int, ascii_only: bool
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    assert [json.loads(element) for element in json_rows.split_array(in_pieces(text, size))] == values


@given(st.text(alphabet='[]{},:"\\ a1\n', max_size=30), st.integers(1, 10))
def test_any_text_is_elements_or_no_array(text: str, size: int) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        elements = list(json_rows.split_array(in_pieces(text, size)))
    except ValueError:
        assert not isinstance(expected, list)
        return
    assert not isinstance(expected, list) or [json.loads(element) for element in elements] == expected


def test_an_array_with_a_stray_quote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: not valid JSON after row 1: unreadable-line: "):
        read(tmp_path / "a.json", b'[{"a": "x" "}, {"a": "y"}, {"a": " "z"}]')
    found = read(tmp_path / "b.json", b'[{"a": tru}, {"a": "y"}]')
    assert reasons(found) == ["unreadable-line", None]
