"""Read raw sources into records with our columns. Imports no torch.

Only rows that cannot be read are refused here; `pipeline.data.validation` checks the values.

In: a file (CSV, TSV, JSON, JSONL, Parquet), a folder of files, a `save_to_disk` folder, or a hub dataset.
Out: a `ParsedRecord` per record, with the raw rows it came from; that of an unreadable row has a `RowError`.
A missing file, a missing column or an unknown file type raises `UserError`.
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import Source
from pipeline.data.columns import (
    choose_columns,
    column_sets,
    find_format,
    kind_of_format,
    name_source,
    shape_columns,
)
from pipeline.data.context import (
    CONTEXT,
    add_context,
    check_columns,
    context_columns,
    drop_ignored,
)
from pipeline.data.dialogues import detach_prompt, parse_dialogue
from pipeline.data.identity import canonical_text
from pipeline.data.mapping import map_rows
from pipeline.data.reward_columns import reward_columns, reward_values
from pipeline.data.schema import KINDS, ROLES, RawRow, RowError
from pipeline.data.serialized import read_list_cell, read_messages_cell
from pipeline.data.shapes.fields import join_texts, read_number
from pipeline.data.shapes.table import SHAPES, Read, kind_of, shape_reader
from pipeline.data.shelf import Shelf, View, shelve
from pipeline.data.sources import iter_rows
from pipeline.data.steps import expand_trajectory, parse_tagged_steps
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

# Columns that a CSV file has as the text of a list.
LISTS = ("messages", "responses", "ranks", "completions", "labels", "label_shares", "history")


@dataclass(slots=True)
class ParsedRecord:
    """A candidate record of one kind, and its raw rows: several if a ranking has a row per response.

    One row may also give several records, one after the other: `is_first` marks the first of them.
    """

    kind: str
    record: dict[str, Any]
    rows: Sequence[RawRow]
    fault: RowError | None = None
    is_first: bool = True

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the record may go to."""
        return self.rows[0].splits


class StoredRecord(ParsedRecord):
    """A `ParsedRecord` whose record and rows are on disk; both are copies each time they are read."""

    __slots__ = ("_place", "_records", "_splits")

    def __init__(self, item: ParsedRecord, records: Shelf, rows: View) -> None:
        self._records, self._splits = records, item.splits
        super().__init__(item.kind, item.record, rows, item.fault, item.is_first)

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
    parts: Sequence[RawRow] = rows
    origins: Sequence[int] = range(len(rows))  # the row that each part is of
    if source.map:
        parts, origins = map_rows(source.map, rows, folder)
    available = dict.fromkeys(name for part in parts if not part.fault for name in part.data)
    source = find_format(source, [*available])
    columns = choose_columns(source, [*available])
    if source.map and "rank" in columns:
        raise UserError(
            f"{name_source(source)}: {source.map} returns 'rank', one response a row; return the lists "
            "'responses' and 'ranks' of a ranking in one row"
        )
    read = shape_reader(str(source.format), (part.data for part in parts if not part.fault))

    records = Shelf(folder)
    items: list[ParsedRecord] = []
    for place, part in enumerate(parts):
        origin, is_first = origins[place], not place or origins[place - 1] != origins[place]
        for item in _parse_shape(source, read, part) if read else _parse_row(source, columns, part):
            item.is_first &= is_first
            items.append(_store(item, records, View(rows.__getitem__, (origin,))))
    return _group_rankings(items, records) if "rank" in columns else items


def _store(item: ParsedRecord, records: Shelf, rows: View) -> StoredRecord:
    """Put a record on disk; one that is nested too deeply becomes a fault."""
    try:
        return StoredRecord(item, records, rows)
    except RecursionError:
        fault = RowError("not-text", "is nested too deeply")
        return StoredRecord(ParsedRecord(item.kind, {}, item.rows, fault, item.is_first), records, rows)


def _parse_row(source: Source, columns: tuple[str, ...], row: RawRow) -> list[ParsedRecord]:
    """Map the columns of a row to ours. The fault of a wrong row goes into its record, which is empty."""
    kind = kind_of_format(source.format)
    try:
        if row.fault:
            raise row.fault
        check_columns(source, row.data)
        optional = [
            name
            for name in KINDS[kind].optional
            if name in source.columns or (name in row.data and name not in source.ignore)
        ]
        named = {name: source.columns.get(name, name) for name in (*columns, *optional)}
        named |= context_columns(source, row.data)
        values = {name: _column_value(row.data, column) for name, column in named.items()} | source.values
        values = {name: drop_ignored(source, _read_cell(name, value)) for name, value in values.items()}
        context = {name: values.pop(name, None) for name in CONTEXT}
        may_be_empty = KINDS[kind].prompt_may_be_empty
        others = _other_values(source, row.data) if KINDS[kind].keeps_columns else {}
        parts = [
            part
            if isinstance(part, RowError)
            else add_context(part, **context, may_be_empty=may_be_empty) | others
            for part in _to_records(columns, values)
        ]
    except RowError as error:
        parts = [RowError(error.reason, error.detail)]  # without the frames that a raised one holds
    except RecursionError:
        parts = [RowError("not-text", "is nested too deeply")]
    return [
        ParsedRecord(kind, {}, [row], part, is_first=not place)
        if isinstance(part, RowError)
        else ParsedRecord(kind, part, [row], is_first=not place)
        for place, part in enumerate(parts)
    ]


def _parse_shape(source: Source, read: Read, row: RawRow) -> Iterator[ParsedRecord]:
    """Parse each record that a published row gives, by `read`, as if a file had it in our columns."""
    shape, data = SHAPES[str(source.format)], row.data if isinstance(row.data, dict) else {}
    ours = {*shape_columns(source.format)}
    mapped = {name: _column_value(data, column) for name, column in source.columns.items() if name in ours}
    values = {name: value for name, value in source.values.items() if name in ours}
    others = {name: value for name, value in data.items() if name not in ours}
    parts: Sequence[dict[str, Any] | RowError] = [{}]
    try:
        parts = parts if row.fault else read(data | mapped | values)
    except RowError as error:
        parts = [RowError(error.reason, error.detail)]  # without the frames that a raised one holds
    except RecursionError:
        parts = [RowError("not-text", "is nested too deeply")]

    for place, part in enumerate(parts):
        if isinstance(part, RowError):
            yield ParsedRecord(shape.kinds[0], {}, [row], part, is_first=not place)
            continue
        kind = kind_of(shape, part)
        columns = next((names for names in column_sets(kind) if {*names} <= part.keys()), ())
        plain = _with_format(source, kind, ours)
        (item,) = _parse_row(plain, columns, row._replace(data=others | part))
        yield ParsedRecord(kind, item.record, [row], item.fault, is_first=not place)


def _with_format(source: Source, format: str, read: set[str]) -> Source:
    """Return a source of another format, without what it gives to columns that are already `read`."""
    kept = {
        key: {name: value for name, value in getattr(source, key).items() if name not in read}
        for key in ("columns", "values")
    }
    return source.model_copy(update={"format": format, **kept})


def _read_cell(name: str, value: Any) -> Any:
    """Return the list that a text is the serialization of, if the column has lists or messages."""
    try:
        if name == "responses":
            responses = read_list_cell(value)
            return list(map(read_messages_cell, responses)) if isinstance(responses, list) else responses
        if name in LISTS:
            return read_list_cell(value)
        return read_messages_cell(value) if name in (*ROLES, "text") else value
    except RowError as fault:
        raise RowError(fault.reason, f"{name}: {fault.detail}") from None


def _column_value(data: dict[str, Any], column: str | list[str]) -> Any:
    """Return the value of a column, or the texts of several joined by a blank line, without the empty ones.

    If one of several is not text, return it: validation refuses it.
    """
    if isinstance(column, str):
        return data.get(column)

    return join_texts([*map(data.get, column)])


def _other_values(source: Source, data: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a row that only reward functions read, as they are.

    Raises `RowError` if one of several columns to join is not text.
    """
    values: dict[str, Any] = {}
    for name, column in reward_columns(source, data).items():
        values[name] = value = _column_value(data, column)
        if isinstance(column, list) and not isinstance(value, str):
            raise RowError("not-text", f"{name}: expected text to join, found {type(value).__name__}")
    return values | reward_values(source)


def _to_records(columns: tuple[str, ...], values: dict[str, Any]) -> list[dict[str, Any] | RowError]:
    """Convert the values of a row to its records, and the reason for each part of it that is left out."""
    if "question" in columns:
        return [
            part if isinstance(part, RowError) else part | values
            for part in expand_trajectory(values["question"], values["label"])
        ]
    return [_to_record(columns, values)]


def _to_record(columns: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """Convert the values of one column set to the columns of the kind.

    Raises `RowError` if the text is no dialogue or the messages are no list.
    """
    if "prompt" in columns:
        names = [name for name in columns if name in ROLES and name != "prompt"]
        ranked = values.get("responses")
        responses = ranked if isinstance(ranked, list) else [values[name] for name in names]
        prompt, responses = detach_prompt(values["prompt"], responses)
        detached = {"responses": responses} if ranked else dict(zip(names, responses, strict=True))
        return values | {"prompt": prompt} | detached
    if "text" in columns:
        text = values["text"]
        prompt, completion = (text[:-1], text[-1:]) if isinstance(text, list) and text[1:] else ("", text)
        return values | {"prompt": prompt, "completion": completion}
    if "input" in columns:
        return values | parse_tagged_steps(values["input"], values["label"])
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
        prompt, response, rank = (item.record[name] for name in ("prompt", "response", "rank"))
        try:
            texts = [canonical_text(prompt), canonical_text(response), canonical_text(_rank_value(rank))]
        except RowError as error:
            item.fault = RowError(error.reason, error.detail)
            continue
        identity = digest((*texts, item.splits))
        if identity in seen:
            item.fault = RowError("duplicate", "an earlier row of this prompt has the same response and rank")
            continue
        seen.add(identity)
        groups[digest((texts[0], item.splits))].append(item)

    rankings = [_merge_ranking(group, records) for group in groups.values()]
    return [*rankings, *(item for item in items if item.fault)]


def _rank_value(rank: Any) -> Any:
    """Return the number that a rank is, so that 1, 1.0 and "1" are one; validation refuses other ranks."""
    try:
        return read_number(rank, "rank")
    except RowError:
        return rank


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
