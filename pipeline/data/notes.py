"""Describe how a source was read: what became a turn, and what was not read. Imports no torch."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.config import Source
from pipeline.data.columns import choose_columns, find_format, kind_of_format, shape_columns
from pipeline.data.context import context_columns, is_refused, used_columns
from pipeline.data.messages import KNOWN_KEYS, UNREAD_KEYS, carries_nothing
from pipeline.data.readers import ParsedRecord
from pipeline.data.reward_columns import reward_columns, reward_values
from pipeline.data.schema import KINDS

TURNS = {"system": "the system turn", "history": "earlier turns"}


def reading_notes(source: Source, items: Sequence[ParsedRecord]) -> list[str]:
    """Return a line for each way in which a source was not read as it is; `items` are those of `read_source`.

    These are the format, if the columns showed it; columns that became turns before the prompt; columns that
    are kept for reward functions; columns with values that are not read; and keys of messages that are not
    read.
    """
    columns: dict[str, bool] = {}  # whether a column has values, by its name
    turns: dict[str, str] = {}
    keys: Counter[str] = Counter()
    if source.map:  # its function read the columns
        return [f"{source.path or source.hub}: rows are mapped by {source.map}"]
    notes = []
    if not source.format:
        source = find_format(source, readable_columns(items))
        notes.append(f"recognized as format: {source.format}")
    for item in items:
        for data in (row.data for row in item.rows if isinstance(row.data, dict)):
            turns |= {name: str(column) for name, column in context_columns(source, data).items()}
            for column, value in data.items():
                columns[column] = columns.get(column, False) or not carries_nothing(value)
        record = item.record
        keys += _unread_keys(record.get(name) for name in KINDS[item.kind].columns)

    notes += [
        f"column {column} is read as {TURNS[name]}; ignore: [{column}] passes it over"
        for name, column in turns.items()
        if name not in source.columns and column not in shape_columns(source.format) and columns.get(column)
    ]
    kept: dict[str, Any] = {}
    if KINDS[kind_of_format(source.format)].keeps_columns:
        kept = reward_columns(source, columns) | reward_values(source)
    if kept:
        notes.append(f"columns kept for reward functions: {', '.join(kept)}")
    if unread := [name for name in _unread_columns(source, columns, turns) if kept.get(name) != name]:
        notes.append(f"columns that are not read: {', '.join(unread)}")
    if keys:
        counts = ", ".join(f"{key} {count:,}" for key, count in sorted(keys.items()))
        notes.append(f"keys of messages that are not read: {counts}")
    return [f"{source.path or source.hub}: {note}" for note in notes]


def unread_parts_note(reasons: Mapping[str, int]) -> str:
    """Return a line on rows that have parts besides text, or "" without such rows. `reasons` counts all."""
    count = sum(reasons.get(reason, 0) for reason in set(UNREAD_KEYS.values()))
    if not count:
        return ""
    return (
        f"{count:,} rows have tools, images or separate reasoning, which are not read; "
        "ignore: [tools], for example, passes a column or a key of messages over"
    )


def readable_columns(items: Iterable[ParsedRecord]) -> list[str]:
    """Return the columns of the rows that could be read, by which a source is recognized."""
    rows = (row for item in items for row in item.rows if not row.fault)
    return [*dict.fromkeys(name for row in rows for name in row.data)]


def _unread_columns(source: Source, columns: dict[str, bool], turns: dict[str, str]) -> list[str]:
    """Return the columns that have values and are neither read, refused nor passed over."""
    ours = (
        *choose_columns(source, [*columns]),
        *KINDS[kind_of_format(source.format)].optional,
        *shape_columns(source.format),
    )
    read = {name for name in ours if name not in source.columns and name not in source.values}
    read |= {*turns.values(), *used_columns(source)}
    return [
        name
        for name, has_values in columns.items()
        if has_values and name not in read and "*" not in ours and not is_refused(name)
    ]


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
