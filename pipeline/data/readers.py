"""Read raw sources into records with our columns. Imports no torch.

Only rows that cannot be read are refused here; `pipeline.data.validation` checks the values.

In: a file (CSV, TSV, JSON, JSONL, Parquet), a folder of files, a `save_to_disk` folder, or a hub dataset.
Out: a `ParsedRecord` per record, with the raw rows it came from; that of an unreadable row has a `RowError`.
A missing file, a missing column or an unknown file type raises `UserError`.
"""

import difflib
import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import Source, nearest
from pipeline.data.dialogues import parse_dialogue
from pipeline.data.schema import KINDS, RawRow, RowError
from pipeline.data.shelf import Shelf, View, shelve
from pipeline.data.sources import iter_rows
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

# Column sets that a format accepts besides the columns of its kind.
# `Source.columns` maps these names to the columns of a file.
ALTERNATIVES: dict[str, list[tuple[str, ...]]] = {
    "dialogues": [("chosen", "rejected")],
    "rankings": [("prompt", "response", "rank")],
    "labels": [("text", "label"), ("messages", "label")],
    "demonstrations": [("messages",)],
}

# Format -> the kind of records it yields, if the two names differ.
FORMAT_KINDS = {"dialogues": "comparisons"}


@dataclass(slots=True)
class ParsedRecord:
    """A candidate record of one kind, and its raw rows: several if a ranking has a row per response."""

    kind: str
    record: dict[str, Any]
    rows: Sequence[RawRow]
    fault: RowError | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the record may go to."""
        return self.rows[0].splits


class StoredRecord(ParsedRecord):
    """A `ParsedRecord` whose record and rows are on disk; both are copies each time they are read."""

    __slots__ = ("_place", "_records", "_splits")

    def __init__(self, item: ParsedRecord, records: Shelf, rows: View) -> None:
        self._records, self._splits = records, item.splits
        super().__init__(item.kind, item.record, rows, item.fault)

    @property
    def record(self) -> dict[str, Any]:
        return self._records[self._place]  # type: ignore[no-any-return]

    @record.setter
    def record(self, record: dict[str, Any]) -> None:
        self._place = self._records.append(record)

    @property
    def splits(self) -> tuple[str, ...]:
        return self._splits


def read_source(source: Source, folder: Path | None = None) -> list[ParsedRecord]:
    """Read all rows of `source`, or its first `limit`. Raises `UserError` if the source cannot be read.

    Rows and records are in temporary files of `folder`, and not in memory.
    """
    rows = shelve(islice(progress_bar("reading", "rows", iter_rows(source)), source.limit), folder)
    columns = _choose_columns(source, rows)

    records = Shelf(folder)
    items: list[ParsedRecord] = [
        StoredRecord(_parse_row(source, columns, row), records, View(rows.__getitem__, (place,)))
        for place, row in enumerate(rows)
    ]
    return _group_rankings(items, records) if "rank" in columns else items


def canonical_text(value: Any) -> str:
    """Return the text that equal prompts or responses share.

    A single user or assistant message equals its content as a string.
    """
    match value:
        case str():
            return value
        case [{"role": "user" | "assistant", "content": str(content)}]:
            return content
    return json.dumps(value, sort_keys=True, default=str)


# Columns


def _kind_of_format(format: str) -> str:
    return FORMAT_KINDS.get(format, format)


def _column_sets(format: str) -> list[tuple[str, ...]]:
    standard = [KINDS[format].columns] if format in KINDS else []
    return [*standard, *ALTERNATIVES.get(format, [])]


def _choose_columns(source: Source, rows: Iterable[RawRow]) -> tuple[str, ...]:
    """Return the column set of the format that the available and the mapped columns fill best.

    Raises `UserError` if a mapping is wrong or a column is missing.
    """
    column_sets, optional = _column_sets(source.format), KINDS[_kind_of_format(source.format)].optional
    available = list(dict.fromkeys(name for row in rows if not row.fault for name in row.data))
    known = dict.fromkeys([*(name for columns in column_sets for name in columns), *optional])
    _check_mapping(source, list(known), available)

    # A mapped column must be read, so a column set without it is not the one the user means.
    mapped = source.columns | source.values
    candidates = [columns for columns in column_sets if mapped.keys() <= {*columns, *optional}] or column_sets
    missing = {
        columns: [name for name in columns if name not in mapped and name not in available]
        for columns in candidates
    }
    columns = min(candidates, key=lambda columns: len(missing[columns]))
    if available and missing[columns]:
        raise _missing_column(source, missing[columns][0], available)
    return columns


def _check_mapping(source: Source, known: list[str], available: list[str]) -> None:
    """Raise `UserError` if `columns` or `values` names an unknown column, or maps one that no row has."""
    for ours, theirs in (source.columns | {name: [] for name in source.values}).items():
        if ours not in known:
            raise UserError(
                f"{_describe(source)}: columns maps {ours!r}, expected one of {', '.join(known)}"
                f"{nearest(ours, known)}"
            )
        for name in [theirs] if isinstance(theirs, str) else theirs:
            if available and name not in available:
                raise UserError(
                    f"{_describe(source)}: columns maps {ours!r} to {name!r}, found {', '.join(available)}"
                    f"{nearest(name, available)}"
                )


def _missing_column(source: Source, name: str, available: list[str]) -> UserError:
    """Build the error for a missing column, with the mapping that would supply it."""
    if len(available) == 1 and {";", "\t"} & set(available[0]):
        return UserError(
            f"{_describe(source)} needs a column {name!r}, found only {available[0]!r}; "
            "separate fields by commas, or by tabs in a .tsv"
        )
    theirs = next(iter(difflib.get_close_matches(name, available, n=1)), "THEIRS")
    return UserError(
        f"{_describe(source)} needs a column {name!r}, found {', '.join(available)}; "
        f"use columns: {{{name}: {theirs}}}"
    )


def _describe(source: Source) -> str:
    return f"{source.path or source.hub}: format {source.format}"


def _parse_row(source: Source, columns: tuple[str, ...], row: RawRow) -> ParsedRecord:
    """Map the columns of a row to ours; the fault of a wrong row goes into its record."""
    kind = _kind_of_format(source.format)
    try:
        if row.fault:
            raise row.fault
        names = [*columns, *KINDS[kind].optional]
        values = {name: _column_value(row.data, source.columns.get(name, name)) for name in names}
        return ParsedRecord(kind, _to_record(columns, values | source.values), [row])
    except RowError as error:
        fault = RowError(error.reason, error.detail)  # without the frames that a raised one holds
        return ParsedRecord(kind, {}, [row], fault)


def _column_value(data: dict[str, Any], column: str | list[str]) -> Any:
    """Return the value of a column, or the texts of several joined by a blank line, without the empty ones.

    If one of several is not text, return it: validation refuses it.
    """
    if isinstance(column, str):
        return data.get(column)

    values = [value for value in map(data.get, column) if value is not None]
    parts = [value for value in values if not isinstance(value, str) or value.strip()]
    not_text = [part for part in parts if not isinstance(part, str)]
    return not_text[0] if not_text else "\n\n".join(parts)


def _to_record(columns: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """Convert the values of one column set to the columns of the kind.

    Raises `RowError` if the text is no dialogue or the messages are no list.
    """
    if "prompt" in columns:
        return values
    if "text" in columns:
        return values | {"prompt": "", "completion": values["text"]}
    if "chosen" in columns:
        return values | parse_dialogue(values["chosen"], values["rejected"])
    if not isinstance(values["messages"], list):
        raise RowError("not-text", f"messages: expected a list, found {type(values['messages']).__name__}")
    return values | {"prompt": values["messages"][:-1], "completion": values["messages"][-1:]}


def _group_rankings(items: list[ParsedRecord], records: Shelf) -> list[ParsedRecord]:
    """Merge items of one response each into one ranking per prompt; their rows need not be adjacent.

    The same response at the same rank counts once. Faulty items come last.
    """
    groups: dict[Hashable, list[ParsedRecord]] = defaultdict(list)
    seen: set[bytes] = set()
    for item in (item for item in items if not item.fault):
        prompt, response, rank = item.record["prompt"], item.record["response"], item.record["rank"]
        identity = digest((canonical_text([prompt, response, rank]), item.splits))
        if identity in seen:
            item.fault = RowError("duplicate", "an earlier row of this prompt has the same response and rank")
            continue
        seen.add(identity)
        groups[digest((canonical_text(prompt), item.splits))].append(item)

    rankings = [_merge_ranking(group, records) for group in groups.values()]
    return [*rankings, *(item for item in items if item.fault)]


def _merge_ranking(items: list[ParsedRecord], records: Shelf) -> ParsedRecord:
    rows = [item.rows for item in items]
    parts = [item.record for item in items]
    ranking = {
        "prompt": parts[0]["prompt"],
        "responses": [part["response"] for part in parts],
        "ranks": [part["rank"] for part in parts],
    }
    return StoredRecord(
        ParsedRecord("rankings", ranking, items[0].rows),
        records,
        View(lambda row: rows[row][0], range(len(rows))),
    )


def digest(value: Hashable) -> bytes:
    """Return 16 bytes that stand for a value of texts, numbers and tuples: many texts would fill memory."""
    return hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()
