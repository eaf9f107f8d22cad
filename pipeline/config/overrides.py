"""`key=value` overrides: parse them, and set them in the plain data of a config file."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config.parsing import parse_value, spell_as_typed
from pipeline.config.values import MAX_DEPTH, shorten
from pipeline.errors import UserError

KEY = re.compile(r"[\w-]+(\.[\w-]+|\[\d+\])*")
NUMBER = re.compile(r"-?\d+")


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[str], reads_text: Callable[[list[str]], bool] | None = None
) -> None:
    """Set each `key=value` in `values`, in order. Raises `UserError`.

    A dot separates a section from its key, and a list from the number of its item, which may be left out if
    the list has one. A value that `reads_text` says is text stays as it was typed, such as `true` or `1e5`.
    """
    for override in overrides:
        path, value = _parse_override(override)
        if reads_text and reads_text(path):
            value = spell_as_typed(value, override.partition("=")[2])
        try:
            _set(values, path, value)
        except ValueError as error:
            raise UserError(f"override {shorten(override)}: {error}") from None


def _parse_override(override: str) -> tuple[list[str], Any]:
    """Return the parts of the key, and the value as YAML reads it."""
    name = f"override {shorten(override)}"
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{name}: expected key=value, such as training.learning_rate=1e-4")
    if not KEY.fullmatch(key):
        raise UserError(
            f"{name}: {shorten(key)} is no key; expected names with dots between them, such as "
            "training.learning_rate or source.0.path"
        )
    path = key.replace("[", ".").replace("]", "").split(".")
    if len(path) > MAX_DEPTH:
        raise UserError(f"{name}: its key has {len(path)} parts; expected at most {MAX_DEPTH}")
    try:
        return path, parse_value(text)
    except ValueError as error:
        raise UserError(f"{name}: its value is not readable as YAML: {error}; quote it") from None


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value at `path`; a section on the way that is missing or null is made."""
    node: Any = values
    for position, part in enumerate(path):
        if position and part == "0" and isinstance(node, dict) and len(path) > position + 1:
            continue  # a list of one may be written as its only item
        if isinstance(node, list) and len(node) == 1 and not NUMBER.fullmatch(part):
            node = node[0]
        key = _key_in(node, part, path, position)
        if position == len(path) - 1:
            node[key] = value
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]


def _key_in(node: Any, part: str, path: list[str], position: int) -> str | int:
    """Return the key or index of `part` in `node`, which is at `path[:position]`. Raises `ValueError`."""
    place, rest = ".".join(path[:position]), ".".join(path[position:])
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ValueError(f"{place} is {shorten(node)}, not a section with keys")
    if not NUMBER.fullmatch(part):
        raise ValueError(f"{place} is a list of {len(node)}; name one of them: {place}.0.{rest}=…")
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(node):
        expected = f"expected 0 to {len(node) - 1}" if node else "it is empty"
        raise ValueError(f"{place} has no item {part}: {expected}")
    return int(part)
