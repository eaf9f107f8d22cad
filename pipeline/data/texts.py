"""Check the texts that a program passes: a list of prompts or responses, each a string or messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UserError


def check_steps(name: str, values: Any) -> None:
    """Raise `UserError` unless `values` is a list of responses: texts, or lists of texts of steps."""
    _check_list(name, values)
    for number, value in enumerate(values):
        is_steps = isinstance(value, list | tuple) and value and isinstance(value[0], str)
        for step, text in enumerate(value if is_steps else ()):
            if not isinstance(text, str):
                raise UserError(
                    f"{name}[{number}][{step}]: expected the text of a step, found {_describe(text)}"
                )
        if not is_steps:
            check_text(f"{name}[{number}]", value)


def check_texts(name: str, values: Any) -> None:
    """Raise `UserError` unless `values` is a list of texts, which may be empty. `name` is the argument's."""
    _check_list(name, values)
    for number, value in enumerate(values):
        check_text(f"{name}[{number}]", value)


def _check_list(name: str, values: Any) -> None:
    is_list = hasattr(values, "__len__") and hasattr(values, "__getitem__")
    if not is_list or isinstance(values, str | bytes | Mapping):
        raise UserError(
            f"{name}: expected a list of texts, found {_describe(values)}; put a single one into a list"
        )
    if any(isinstance(value, Mapping) for value in values):
        raise UserError(f"{name}: expected a list of texts, found the messages of one; put them into a list")


def check_text(name: str, value: Any) -> None:
    """Raise `UserError` unless `value` is a string, or messages with a role and text as content.

    A prompt of no messages is an empty one.
    """
    if isinstance(value, str):
        return
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise UserError(
            f"{name}: expected a string or a list of messages, found {_describe(value)}; pass text, or "
            "leave it out"
        )
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            problem = _describe(message)
        elif not isinstance(message.get("role"), str):
            problem = f"{_describe(message.get('role'))} as its role"
        elif not isinstance(message.get("content"), str):
            problem = f"{_describe(message.get('content'))} as its content"
        else:
            continue
        raise UserError(
            f"{name}[{number}]: expected a message, a dict with a role and text as content, found {problem}; "
            "join other content into one text"
        )


def check_count(name: str, value: Any) -> None:
    """Raise `UserError` unless `value` is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}={value!r}: expected a whole number above 0")


def _describe(value: Any) -> str:
    """Return what was found: a number or a string as it is, another value by its type."""
    if value is None or isinstance(value, int | float | str):
        return repr(value)[:80]
    if hasattr(value, "__len__") and not len(value):
        return f"an empty {type(value).__name__}"
    return f"a {type(value).__name__}"
