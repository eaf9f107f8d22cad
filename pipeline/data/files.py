"""Read files of rows, by suffix. Imports no torch.

In: a CSV, TSV, JSON, JSONL or Parquet file.
Out: a `RawRow` for each row; that of a row which cannot be read has a `RowError`.
A file whose rows cannot be told apart raises `UserError`.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.schema import RawRow, RowError
from pipeline.errors import UserError


def _read_json(path: Path) -> Iterator[RawRow]:
    """Read an array of objects, or an object per line, as many `.json` files have it."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if not text.lstrip().startswith("[") and '"' in text.lstrip().partition("\n")[0]:
        yield from _read_jsonl(path)
        return

    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, list):
        raise UserError(
            f"{path}: expected an array of objects, or an object per line; found one {type(values).__name__}"
        )
    yield from (_to_raw_row(path, number, value) for number, value in enumerate(values, 1))


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield _to_raw_row(path, number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield RawRow(str(path), number, line.rstrip("\n"), RowError("unreadable-line", str(error)))


def _to_raw_row(path: Path, number: int, value: Any) -> RawRow:
    fault = None
    if not isinstance(value, dict):
        fault = RowError("unreadable-line", f"expected an object, found {type(value).__name__}")
    return RawRow(str(path), number, value, fault)


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)
    # newline="" keeps newlines inside fields.
    # Bytes that are not UTF-8 become lone surrogates, which the validation finds.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        records = _iter_csv_records(path, csv.reader(lines, delimiter=delimiter, strict=True))
        _, header = next(records, (1, []))
        if len(set(header)) < len(header):
            raise UserError(
                f"{path}: expected column names, each of them once, in the first line; found {header}"
            )

        for line, fields in records:
            if len(fields) == len(header):
                yield RawRow(str(path), line, dict(zip(header, fields, strict=True)))
            else:
                detail = f"expected {len(header)} fields, found {len(fields)}"
                yield RawRow(str(path), line, fields, RowError("unreadable-line", detail))


def _iter_csv_records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line of a record, its fields); blank lines are not records.

    After a stray quote the start of the next record is unknown, so that raises `UserError` and drops no row.
    """
    while True:
        line = reader.line_num + 1
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


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        values = parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, ImportError) as error:
        raise UserError(f"{path}: not readable as Parquet: {first_line(error)}") from None
    yield from (RawRow(str(path), number, value) for number, value in enumerate(values, 1))


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
