"""Describe how a source was read: what became a turn, and what was not read. Imports no torch."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pipeline.config import Source
from pipeline.data.context import context_columns, is_refused, used_columns
from pipeline.data.messages import KNOWN_KEYS, carries_nothing
from pipeline.data.readers import ParsedRecord, choose_columns, kind_of_format
from pipeline.data.schema import KINDS, RawRow

TURNS = {"system": "the system turn", "history": "earlier turns"}


def reading_notes(source: Source, items: list[ParsedRecord]) -> list[str]:
    """Return a line for each way in which a source was not read as it is; `items` are those of `read_source`.

    These are columns that became turns before the prompt, columns with values that are not read, and keys of
    messages that are not read.
    """
    rows = [row for item in items for row in item.rows if isinstance(row.data, dict)]
    notes = [
        f"column {column} is read as {TURNS[name]}; ignore: [{column}] passes it over"
        for name, column in _turn_columns(source, rows).items()
        if name not in source.columns and _has_values(column, rows)
    ]
    if columns := _unread_columns(source, rows):
        notes.append(f"columns that are not read: {', '.join(columns)}")

    names = KINDS[kind_of_format(source.format)].columns
    if keys := _unread_keys(item.record.get(name) for item in items for name in names):
        counts = ", ".join(f"{key} {count:,}" for key, count in sorted(keys.items()))
        notes.append(f"keys of messages that are not read: {counts}")
    return [f"{source.path or source.hub}: {note}" for note in notes]


def _turn_columns(source: Source, rows: list[RawRow]) -> dict[str, str]:
    return {name: str(column) for row in rows for name, column in context_columns(source, row.data).items()}


def _unread_columns(source: Source, rows: list[RawRow]) -> list[str]:
    """Return the columns that have values and are neither read, refused nor passed over."""
    columns = (*choose_columns(source, rows), *KINDS[kind_of_format(source.format)].optional)
    read = {name for name in columns if name not in source.columns and name not in source.values}
    read |= {*_turn_columns(source, rows).values(), *used_columns(source)}
    others = dict.fromkeys(name for row in rows for name in row.data if name not in read)
    return [name for name in others if not is_refused(name) and _has_values(name, rows)]


def _has_values(column: str, rows: list[RawRow]) -> bool:
    return any(not carries_nothing(row.data.get(column)) for row in rows)


def _unread_keys(values: Iterable[Any]) -> Counter[str]:
    """Return the keys of messages that are neither read nor known to change nothing, and their counts."""
    counts: Counter[str] = Counter()
    for value in values:
        for message in value if isinstance(value, list) else ():
            if isinstance(message, dict):
                unknown = (key for key in message if key not in KNOWN_KEYS)
                counts.update(key for key in unknown if not carries_nothing(message[key]))
            elif isinstance(message, list):  # a response of a ranking
                counts += _unread_keys([[item for item in message if isinstance(item, dict)]])
    return counts
