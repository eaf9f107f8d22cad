"""Turn raw rows into rows of a format by a function of the user, `source.map`. Imports no torch.

In: a row as a dict. Out: a row, a list of rows, or None for no row, in the columns of the source's format. A
row for which the function fails, or gives no row, is quarantined with the function, the file and the line.
"""

import pickle
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.importing import describe_failure, import_function
from pipeline.data.json_rows import find_fault
from pipeline.data.schema import RawRow, RowError
from pipeline.data.shelf import Shelf
from pipeline.errors import one_line

RETURNED = "a row (a dict), a list of rows, or None"
SIGNATURE = f"(row) -> {RETURNED}"


def map_rows(spec: str, rows: Sequence[RawRow], folder: Path | None = None) -> tuple[Shelf, Sequence[int]]:
    """Return the rows that the function makes of `rows`, and for each the place of the one it was made from.

    They are in a temporary file of `folder`. Raises `UserError` if there is no such function.
    """
    function = import_function(spec, SIGNATURE)
    mapped, origins = Shelf(folder), array("q")  # whole numbers of eight bytes
    for place, row in enumerate(rows):
        for part in [row] if row.fault else _map_row(spec, function, row):
            mapped.append(part)
            origins.append(place)
    return mapped, origins


def _map_row(spec: str, function: Callable[[Any], Any], row: RawRow) -> Iterator[RawRow]:
    try:
        for data in _call(spec, function, row.data):
            yield row._replace(data=data)
    except RowError as fault:
        yield row._replace(fault=RowError(fault.reason, fault.detail))


def _call(spec: str, function: Callable[[Any], Any], data: Any) -> list[dict[str, Any]]:
    """Return the rows that the function makes of one. Raises `RowError`."""
    try:
        returned = function(data)
    except (Exception, SystemExit) as error:  # the function is the user's code
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        raise RowError("map-failed", f"{spec}: {describe_failure(error, file)}") from None
    parts = list(returned) if isinstance(returned, list | tuple) else [returned]
    if parts in ([], [None]):
        raise RowError("not-mapped", f"{spec} returned no row")
    for part in parts:
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            wrong = "a key that is no text" if isinstance(part, dict) else f"a {type(part).__name__}"
            raise RowError("map-failed", f"{spec}: returned {wrong}; expected {RETURNED}")
        if fault := find_fault(part):
            raise RowError("map-failed", f"{spec}: returned a row that {fault.detail}")
    try:
        pickle.dumps(parts)
        repr(parts)  # raises for an integer of too many digits, which quarantine.jsonl cannot hold
    except Exception as error:  # whatever a value of the user raises
        raise RowError(
            "map-failed", f"{spec}: returned a value that no file can hold: {one_line(error)}"
        ) from None
    return parts
