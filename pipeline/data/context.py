"""Read what a row has besides its prompt: a system turn, earlier turns, and columns that are not read.

Imports no torch.
"""

from functools import cache
from typing import Any

from pipeline.config import Source
from pipeline.data.identity import is_blank
from pipeline.data.messages import (
    UNREAD_KEYS,
    carries_nothing,
    preview,
    read_message,
    unread_error,
)
from pipeline.data.schema import RowError

# Columns that are read as turns before the prompt, and their other names.
CONTEXT = {"system": ("system", "system_prompt", "system_message"), "history": ("history",)}


def context_columns(source: Source, data: dict[str, Any]) -> dict[str, str | list[str]]:
    """Return which column of a row has the system turn, and which the earlier turns, if any does."""
    columns: dict[str, str | list[str]] = {}
    for name, spellings in CONTEXT.items():
        if name in source.columns:
            columns[name] = source.columns[name]
        elif name not in source.values:
            present = [spelling for spelling in spellings if spelling in data]
            if free := [spelling for spelling in present if spelling not in used_columns(source)]:
                columns[name] = free[0]
    return columns


def used_columns(source: Source) -> set[str]:
    """Return the columns of the source that are mapped or passed over."""
    mapped = ([theirs] if isinstance(theirs, str) else theirs for theirs in source.columns.values())
    return {*source.ignore, *(name for names in mapped for name in names)}


def check_columns(source: Source, data: dict[str, Any]) -> None:
    """Raise `RowError` if a row has a column, such as `tools`, that changes what is said and is not read."""
    for column, value in data.items():
        if is_refused(column) and not carries_nothing(value) and column not in used_columns(source):
            raise unread_error(column, UNREAD_KEYS[column.strip().lower()])


@cache
def is_refused(column: str) -> bool:
    """Return whether a column changes what is said. Reasoning beside a response is often an annotator's."""
    return UNREAD_KEYS.get(column.strip().lower(), "reasoning") != "reasoning"


def drop_ignored(source: Source, value: Any) -> Any:
    """Return messages without the keys that the source passes over; other values as they are."""
    if not source.ignore or not isinstance(value, list):
        return value
    return [
        {key: item for key, item in message.items() if key not in source.ignore}
        if isinstance(message, dict)
        else drop_ignored(source, message)
        for message in value
    ]


def add_context(record: dict[str, Any], system: Any, history: Any, may_be_empty: bool) -> dict[str, Any]:
    """Return a record whose prompt begins with the system turn and the earlier turns.

    An empty prompt stays empty, unless it `may_be_empty`.
    Raises `RowError` if they cannot be read, or if the prompt has another system turn.
    """
    turns, system = _read_history(history), _read_system(system)
    prompt = record["prompt"]
    is_empty = prompt is None or prompt == [] or (isinstance(prompt, str) and is_blank(prompt))
    if not (system or turns) or (is_empty and not may_be_empty) or not isinstance(prompt, str | list | None):
        return record

    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    messages = [] if is_empty else messages
    first = read_message(messages[0]) if messages else {"role": None}
    own = messages[:1] if first["role"] == "system" else []
    if own and system and first["content"] != system:
        raise RowError("two-system-turns", "the messages have a system turn, and the column another one")
    head = own or ([{"role": "system", "content": system}] if system else [])
    return record | {"prompt": [*head, *turns, *messages[len(own) :]]}


def _read_system(value: Any) -> str:
    if value is None or (isinstance(value, str) and is_blank(value)) or carries_nothing(value):
        return ""
    if not isinstance(value, str):
        raise RowError("not-text", f"system: expected text, found {type(value).__name__}")
    return value


def _read_history(value: Any) -> list[Any]:
    """Return the messages of earlier turns, given as messages or as [question, answer] pairs."""
    if carries_nothing(value):
        return []
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    if isinstance(value, list) and all(isinstance(item, list | tuple) and len(item) == 2 for item in value):
        return [
            {"role": role, "content": text}
            for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    raise RowError(
        "not-text",
        f"history: expected [question, answer] pairs or messages, found {preview(value)}; "
        "map it with columns, or pass it over with ignore: [history]",
    )
