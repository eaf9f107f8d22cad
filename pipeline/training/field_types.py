"""Check that the fields of an arguments class have values of their types, as a dataclass does not."""

import dataclasses
import inspect
import os
import typing
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union

import numpy as np

from pipeline.config.values import MAX_INTEGER, shorten

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    NoneType: "None",
    list: "a list",
    dict: "a dict",
}
UNCHECKED = ("fsdp", "accelerator_config")  # the Trainer also takes values that their types do not name


def type_hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass; all are `Any` if one needs a package that is missing."""
    try:
        return typing.get_type_hints(cls)
    except Exception:  # whatever the evaluation of a forward reference raises
        return {field.name: Any for field in dataclasses.fields(cls)}


def check_types(arguments: Any) -> None:
    """Raise `ValueError` for the first field whose value is not of its type.

    Whole numbers are numbers, and true and false are not. Numbers of numpy become Python's, and paths text.
    """
    hints = type_hints(type(arguments))
    for field in dataclasses.fields(arguments):
        value, options = getattr(arguments, field.name), _options(hints[field.name])
        if isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, os.PathLike) and str in options:
            value = os.fspath(value)
        if field.name not in UNCHECKED and (expected := _find_problem(value, options)):
            raise ValueError(f"{field.name}={shorten(value)}: expected {expected}")
        setattr(arguments, field.name, value)


def _find_problem(value: Any, options: list[Any]) -> str:
    """Return what was expected instead of the value, or an empty string."""
    if not any(_fits(value, option) for option in options):
        words = dict.fromkeys(filter(None, map(_describe, options)))
        return " or ".join(sorted(words, key="None".__eq__))
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "a number of at most 64 bits"
    enumeration = next(
        (option for option in options if inspect.isclass(option) and issubclass(option, Enum)), None
    )
    if enumeration and isinstance(value, str) and value not in [member.value for member in enumeration]:
        return f"one of {', '.join(member.value for member in enumeration)}"
    return ""


def _options(hint: Any) -> list[Any]:
    """Return the types of a union or of one type, with `list` for `list[str]`."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else [hint]
    return [part if _is_literal(part) else typing.get_origin(part) or part for part in parts]


def _is_literal(option: Any) -> bool:
    return typing.get_origin(option) is Literal


def _fits(value: Any, option: Any) -> bool:
    if option is Any:
        return True
    if _is_literal(option):
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(option))
    if isinstance(value, bool):
        return option is bool
    return isinstance(value, (int, float) if option is float else option)


def _describe(option: Any) -> str:
    """Return a type in words; the members of an enumeration are text too."""
    if _is_literal(option):
        return " or ".join(map(str, typing.get_args(option)))
    return "" if issubclass(option, Enum) else WORDS.get(option, f"a {option.__name__}")
