"""Read lists that a CSV or Parquet cell has as text: JSON, Python's repr, or numpy's text of an array.

A text is only taken for messages if all of it has their shape: a list of objects with a role and a content,
or one such object. Another text that begins with a bracket stays text. Imports no torch.
"""

import ast
import json
import re
from typing import Any

from pipeline.data.messages import ROLE_KEYS, TEXT_KEYS
from pipeline.data.schema import RowError

MAX_CHARACTERS = 1_000_000  # of Python's and numpy's text: parsing takes about a hundred times its size
MAX_DEPTH = 50

OBJECTS = re.compile(r"""\s*(?:array\(\s*)?(?:\[\s*)?\{\s*['"]""")
LIST = re.compile(r"\s*(?:array\(\s*)?\[")
# What shows that a text was meant as messages, even if it cannot be parsed.
ROLE_SHOWN = re.compile(rf"""['"](?:{"|".join(ROLE_KEYS)})['"]\s*:\s*['"]""")
TEXT_SHOWN = re.compile(rf"""['"](?:{"|".join(TEXT_KEYS)})['"]\s*:""")

# The tokens of Python's repr and of numpy's text. Nothing else is evaluated.
TOKEN = re.compile(
    r"""(?P<string>'[^'\\]*(?:\\[\\'"abfnrtvxuU0-7][^'\\]*)*'|"[^"\\]*(?:\\[\\'"abfnrtvxuU0-7][^"\\]*)*")"""
    r"""|(?P<dtype>,\s*dtype=(?:[a-zA-Z0-9_.]+|'[^']*')|array(?=\())"""
    r"""|(?P<value>-?\d+\.?\d*(?:[eE][+-]?\d+)?|True|False|None|nan)|(?P<open>[\[({])|(?P<close>[\])}])"""
    r"""|(?P<mark>[,:])|\s+"""
)


def read_messages_cell(value: Any) -> Any:
    """Return the messages that a text is the serialization of, one message as a list, and others as they are.

    Raises `RowError` if a text begins like messages and cannot be parsed.
    """
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, str) or not OBJECTS.match(value):
        return value
    parsed = parse_list(value)
    if parsed is None and ROLE_SHOWN.search(value) and TEXT_SHOWN.search(value):
        raise RowError(
            "unreadable-list",
            "begins like serialized messages, but is neither JSON nor a Python list to its end; "
            "save the column as JSON",
        )
    messages = parsed if isinstance(parsed, list) else [parsed]
    return messages if messages and all(map(_is_message, messages)) else value


def read_list_cell(value: Any) -> Any:
    """Return the list that a text is the serialization of, and another value as it is.

    Raises `RowError` if a text begins like a list and cannot be parsed.
    """
    if not isinstance(value, str) or not LIST.match(value):
        return value
    parsed = parse_list(value)
    if not isinstance(parsed, list):
        raise RowError(
            "unreadable-list",
            "begins like a list, but is neither JSON nor a Python list to its end; save the column as JSON",
        )
    return parsed


def parse_list(text: str) -> Any:
    """Return the value that JSON, Python's repr or numpy's text stands for, or None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    python = _to_python(text) if len(text) <= MAX_CHARACTERS else None
    try:
        return None if python is None else ast.literal_eval(python)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _to_python(text: str) -> str | None:
    """Return numpy's text as Python's, with commas and without types, or None if it is neither."""
    pieces: list[str] = []
    end, depth, after_value = 0, 0, False
    for token in TOKEN.finditer(text):
        kind, piece = token.lastgroup, token.group()
        depth += (kind == "open") - (kind == "close")
        if token.start() != end or depth > MAX_DEPTH:
            return None
        end = token.end()
        if kind in ("dtype", None):
            continue
        if after_value and kind in ("string", "value", "open"):
            pieces.append(",")  # numpy writes white space there, and Python would join two strings
        pieces.append("None" if piece == "nan" else piece)
        after_value = kind in ("string", "value", "close")
    return " ".join(pieces) if end == len(text) else None


def _is_message(value: Any) -> bool:
    """Return whether a value is an object with a role and a content, whatever they are called."""
    if not isinstance(value, dict) or not any(isinstance(value.get(key), str) for key in ROLE_KEYS):
        return False
    return any(key in value and isinstance(value[key], str | list | None) for key in TEXT_KEYS)
