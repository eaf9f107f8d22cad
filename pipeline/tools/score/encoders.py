"""The bytes of an output file: CSV, JSONL or Parquet."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.quarantine import json_line
from pipeline.errors import UserError

Columns = dict[str, Any]


def encode_output(output: Path, rows: list[Columns], new: Sequence[str], source: Path) -> bytes:
    """Return the bytes of the file `output`: the columns that any row has, the `new` ones last.

    `source` is the file that the rows come from.
    """
    names = sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name in new)
    return ENCODERS[output.suffix.lower()](names, rows, source)


def _encode_csv(names: list[str], rows: list[Columns], source: Path) -> bytes:
    lines: list[list[Any]] = [names, *([row.get(name) for name in names] for row in rows)]
    # Not csv.writer: with these line ends it leaves a lone \r unquoted up to Python 3.12.
    text = "".join(",".join(map(_csv_field, line)) + "\n" for line in lines)
    return text.encode("utf-8", "backslashreplace")


def _csv_field(value: Any) -> str:
    """Return a field: empty for None, JSON for a list or a dict."""
    if value is None:
        return ""
    text = json_line(value).rstrip() if isinstance(value, list | dict) else str(value)
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _encode_jsonl(names: list[str], rows: list[Columns], source: Path) -> bytes:
    return "".join(map(json_line, rows)).encode()


def _encode_parquet(names: list[str], rows: list[Columns], source: Path) -> bytes:
    """Encode with the types of a Parquet source, else with those of the values.

    Raises `UserError` if the values of a column have several types.
    """
    import pyarrow
    from pyarrow import parquet

    schema = parquet.read_schema(source) if source.suffix.lower() == ".parquet" else []
    types = {field.name: field.type for field in schema}
    stream = io.BytesIO()
    try:
        columns = {name: pyarrow.array([row.get(name) for row in rows], types.get(name)) for name in names}
        parquet.write_table(pyarrow.table(columns), stream)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{source}: cannot be written as Parquet: {error}; write a .jsonl") from None
    return stream.getvalue()


ENCODERS: dict[str, Callable[[list[str], list[Columns], Path], bytes]] = {
    ".csv": _encode_csv,
    ".jsonl": _encode_jsonl,
    ".parquet": _encode_parquet,
}
