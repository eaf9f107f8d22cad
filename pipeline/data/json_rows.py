"""Parse rows of JSON: an object of one text, and the elements of an array that is too long to hold.

Imports no torch.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.data.schema import RowError
from pipeline.data.text_files import MAX_CHARS

MAX_DEPTH = 100  # of a row; whatever reads or writes rows recurses into them

# A whole string, or what begins, ends or separates elements. A quote alone begins a string that the buffer
# cuts. The quantifiers are possessive, so that a long string needs no memory.
TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)
CHUNK_CHARS = 2**16


def parse_object(text: str) -> dict[str, Any]:
    """Return the object of one row. Raises `RowError`, also for a key that is given twice."""
    if len(text) > MAX_CHARS:
        raise RowError("unreadable-line", f"is longer than {MAX_CHARS:,} characters")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise RowError("unreadable-line", f"is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise RowError("unreadable-line", str(error)) from error
    if fault := find_fault(value):
        raise fault
    return value  # type: ignore[no-any-return]


def find_fault(value: Any) -> RowError | None:
    """Return why a value is no row: it is no dict of columns, or nested too deep."""
    if not isinstance(value, dict):
        return RowError("unreadable-line", f"expected an object, found {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [item for parent in level for item in _items(parent) if isinstance(item, dict | list | tuple)]
        if not level:
            return None
    return RowError("unreadable-line", f"is nested more than {MAX_DEPTH} deep")


def _items(parent: Any) -> Any:
    return parent.values() if isinstance(parent, dict) else parent


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RowError("repeated-key", f"the key {repeated!r} is given twice")
    return value


def split_array(read: Callable[[int], str]) -> Iterator[str]:
    """Yield the text of each element of an array, or of several after each other.

    `read(n)` returns at most n characters, and "" at the end. Brackets and quotes alone end an element, so
    one that cannot be parsed hides no other. Raises `ValueError` if they do not match, or if an element is
    longer than `MAX_CHARS`.
    """
    buffer, start, position, depth = "", 0, 0, 0  # an element starts at `start`
    while True:
        match = TOKEN.search(buffer, position)
        if match is None or match[0] == '"':
            if len(buffer) - start > MAX_CHARS:
                raise ValueError(f"an element is longer than {MAX_CHARS:,} characters")
            position = (match.start() if match else len(buffer)) - start
            buffer, start = buffer[start:], 0
            more = read(max(CHUNK_CHARS, len(buffer)))  # doubled, so that a long string takes linear time
            if not more:
                break
            buffer += more
            continue

        token, position = match[0], match.end()
        if depth == 0:
            _require_blank(buffer[start:position].removesuffix("["))
            depth, start = 1, position
        elif depth == 1 and token in (",", "]", "}"):
            if element := buffer[start : match.start()].strip():
                yield element
            depth, start = int(token == ","), position
        elif token in ("[", "{"):
            depth += 1
        elif token in ("]", "}"):
            depth -= 1
    if depth:
        raise ValueError("the array does not end")
    _require_blank(buffer)


def _require_blank(text: str) -> None:
    if text.strip("\ufeff \t\r\n"):
        raise ValueError(f"found {text.strip()[:40]!r} outside of an array")
