"""Read files of rows, by suffix. Imports no torch.

In: a CSV, TSV, JSON, JSONL or Parquet file; all but Parquet may be compressed.
Out: a `RawRow` for each row; that of a row which cannot be read has a `RowError`.
A file whose rows cannot be told apart raises `UserError`.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from pipeline.data.json_rows import find_fault, parse_object, split_array
from pipeline.data.schema import RawRow, RowError
from pipeline.data.text_files import (
    COMPRESSED_SUFFIXES,
    MAX_CHARS,
    iter_lines,
    open_text,
    preview,
    read_start,
)
from pipeline.errors import UserError, one_line

BATCH_ROWS = 64  # of a Parquet file or a dataset: held at once
ADVICE = "drop that column, or save it as text"
SEVERAL_OBJECTS = re.compile(r"\}\s*,\s*\{")

Reader = Callable[[Path], Iterator[RawRow]]


# JSON


def _read_json(path: Path) -> Iterator[RawRow]:
    """Read an array of objects, or an object per line: `.json` and `.jsonl` files have either."""
    start = read_start(path)
    if start.startswith("[") and (data_suffix(path) == ".json" or start[1:].lstrip().startswith("{")):
        yield from _read_array(path)
        return

    if start.partition("\n")[0].strip() == "{":
        raise UserError(
            f"{path}: expected an array of objects, or an object per line; found an object over several lines"
        )
    with open_text(path) as text:
        for line, content in enumerate(iter_lines(text), 1):
            if content.strip():
                yield _parse_json_row(path, line, content)[0]


def _read_array(path: Path) -> Iterator[RawRow]:
    """Read the elements one by one. Raises `UserError` if they cannot be told apart."""
    number = 0
    with open_text(path) as text:
        try:
            for number, content in enumerate(split_array(text.read), 1):
                row, is_valid_json = _parse_json_row(path, number, content)
                if not is_valid_json and SEVERAL_OBJECTS.search(content):  # as after a stray quote
                    raise ValueError(row.fault)
                yield row
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON after row {number}: {one_line(error)}") from None


def _parse_json_row(path: Path, number: int, content: str) -> tuple[RawRow, bool]:
    """Return a row, and whether it is valid JSON at all."""
    try:
        return RawRow(str(path), number, parse_object(content)), True
    except RowError as error:
        fault = RowError(error.reason, error.detail)  # without the frames that a raised one holds
        is_valid_json = not isinstance(error.__cause__, json.JSONDecodeError)
        return RawRow(str(path), number, preview(content), fault), is_valid_json


# CSV


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[RawRow]:
    """Read records below a line of column names, which may tell another delimiter than the usual one."""
    csv.field_size_limit(MAX_CHARS)
    with open_text(path, newline="") as text:  # "" keeps newlines inside fields
        lines = _csv_lines(path, text)
        first, skipped = next(lines, ""), 0
        declared = re.fullmatch(r'"?sep=(.)"?\s*', first, re.IGNORECASE)  # by Excel
        if declared:
            first, skipped = next(lines, ""), 1
        delimiter = declared[1] if declared else _find_delimiter(first, delimiter)
        reader = csv.reader(
            chain([first], lines),
            delimiter=delimiter,
            skipinitialspace=_pads_fields(first, delimiter),
            strict=True,
        )

        records = _iter_csv_records(path, reader, skipped)
        header = _column_names(next(records, (1, []))[1])
        fault = _find_repeated(header)
        for line, fields in records:
            yield _to_csv_row(str(path), line, header, fields, fault)


def _csv_lines(path: Path, text: TextIO) -> Iterator[str]:
    for number, line in enumerate(iter_lines(text), 1):
        if len(line) > MAX_CHARS:
            raise UserError(f"{path}:{number}: a line is longer than {MAX_CHARS:,} characters; remove it")
        yield line


def _find_delimiter(header: str, usual: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return next((delimiter for delimiter in (usual, ",", "\t", ";") if delimiter in unquoted), usual)


def _pads_fields(header: str, delimiter: str) -> bool:
    """Return whether a blank follows each delimiter, so that it belongs to no field."""
    others = header.split(delimiter)[1:]
    return bool(others) and all(name.startswith(" ") for name in others)


def _column_names(header: list[str]) -> list[str]:
    """Return the names without blanks at their edges; a second column without a name gets one."""
    names = [name.strip() for name in header]
    first = names.index("") if "" in names else None
    return [name or ("" if index == first else f"column {index + 1}") for index, name in enumerate(names)]


def _to_csv_row(
    source: str, line: int, header: list[str], fields: list[str], fault: RowError | None
) -> RawRow:
    if len(fields) != len(header):
        fault = RowError("unreadable-line", f"expected {len(header)} fields, found {len(fields)}")
    elif fields[0].strip() == header[0] and _column_names(fields) == header:
        fault = RowError("repeated-header", "repeats the names of the columns")
    return RawRow(source, line, fields if fault else dict(zip(header, fields, strict=True)), fault)


def _find_repeated(names: list[str]) -> RowError | None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    return RowError("repeated-key", f"the column {repeated[0]!r} is given twice") if repeated else None


def _iter_csv_records(path: Path, reader: Any, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line of a record, its fields); blank lines are not records.

    After a stray quote the start of the next record is unknown, so that raises `UserError` and drops no row.
    """
    while True:
        line = reader.line_num + skipped + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: not valid CSV from here on: {error}; "
                'close the quotes of each field, and write a quote inside one as ""'
            ) from None
        if fields:
            yield line, fields


# Parquet


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            fault = _find_repeated(file.schema_arrow.names)
            for batch in file.iter_batches(BATCH_ROWS):
                for values, cell_fault in parse_batch(batch):
                    number += 1
                    yield RawRow(str(path), number, values, fault or cell_fault)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, ImportError) as error:
        raise UserError(f"{path}: not readable as Parquet: {first_line(error)}") from None


def parse_batch(batch: Any) -> list[tuple[dict[str, Any], RowError | None]]:
    """Return the rows of a `pyarrow` batch or table, each with its fault; an unreadable value is None."""
    try:
        return [(row, find_fault(row)) for row in batch.to_pylist()]
    except Exception:  # whatever the conversion of some type raises; it is told for its row
        return [_parse_cells(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _parse_cells(row: Any) -> tuple[dict[str, Any], RowError | None]:
    values: dict[str, Any] = {}
    fault = None
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            (values[name],) = column.to_pylist()
        except Exception as error:
            values[name] = None
            detail = f"{name}: {first_line(error)}; {ADVICE}"
            fault = fault or RowError("unreadable-value", detail)
    return values, fault or find_fault(values)


READERS: dict[str, Reader] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".parquet": _read_parquet,
}


def find_reader(path: Path) -> Reader | None:
    """Return the reader of a file that is named alone, or None; a `.txt` is a table, as Excel saves one."""
    return READERS.get(data_suffix(path).replace(".txt", ".tsv"))


def data_suffix(path: Path) -> str:
    """Return the suffix of a name in lower case, without that of a compression."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED_SUFFIXES:
        return suffix
    inner = Path(path.stem).suffix.lower()
    return suffix if inner == ".parquet" else inner  # Parquet compresses its own columns


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
