"""Read the fields of published rows, and build records of them. Imports no torch.

A field that is not as it is published raises `RowError`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.messages import preview
from pipeline.data.schema import Record, RowError
from pipeline.data.serialized import parse_list, read_list_cell

Part = Record | RowError  # a record that a row gives, or why a part of the row gives none


def read_list(row: Record, name: str) -> list[Any]:
    """Return a list, or the list that the text of a CSV cell stands for."""
    value = read_list_cell(row.get(name))
    if not isinstance(value, list):
        raise RowError("wrong-shape", f"{name}: expected a list, found {type(value).__name__}")
    return value


def read_objects(row: Record, name: str) -> list[Record]:
    """Return a list of objects."""
    values = read_list(row, name)
    for value in values:
        if not isinstance(value, dict):
            raise RowError("wrong-shape", f"{name}: expected objects, found {type(value).__name__}")
    return values


def read_object(row: Record, name: str) -> Record:
    """Return an object, or the object that the text of a CSV cell stands for."""
    value = row.get(name)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_list(value)
    if not isinstance(value, dict):
        raise RowError("wrong-shape", f"{name}: expected an object, found {type(value).__name__}")
    return value


def read_number(value: Any, name: str) -> float:
    """Return a finite number, or the one that a text stands for."""
    try:
        number = float("a bool" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise RowError("not-a-number", f"{name}: found {preview(value)}") from None
    if not math.isfinite(number):  # every comparison with NaN is false
        raise RowError("not-finite", f"{name}: found {preview(value)}")
    return number


def join_texts(values: Sequence[Any]) -> Any:
    """Return the texts joined by a blank line, without the empty ones; or the first value that is no text."""
    parts = [value for value in values if value is not None and (not isinstance(value, str) or value.strip())]
    not_text = [part for part in parts if not isinstance(part, str)]
    return not_text[0] if not_text else "\n\n".join(parts)


def read_winner(row: Record, name: str, winners: Mapping[str, str]) -> str:
    """Return "a", "b" or "tie", which `winners` has for the value of a column: 1, 1.0 and "1" are one."""
    value = row.get(name)
    key = str(value).strip().lower().removesuffix(".0")
    if key not in winners:
        expected = ", ".join(winners)
        raise RowError("no-winner", f"{name}: expected one of {expected}; found {preview(value)}")
    return winners[key]


def compare(prompt: Any, a: Any, b: Any, winner: str, **optional: Any) -> Record:
    """Return the comparison of two responses by one vote, whose winner is "a", "b" or "tie"."""
    chosen, rejected = (b, a) if winner == "b" else (a, b)
    tie = {"preference": 0.5} if winner == "tie" else {}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **tie, **optional}


def compare_numbers(prompt: Any, a: Any, b: Any, number_a: float, number_b: float, **optional: Any) -> Record:
    """Return the comparison of two responses, of which the one with the higher number is preferred."""
    winner = "tie" if number_a == number_b else "a" if number_a > number_b else "b"
    return compare(prompt, a, b, winner, **optional)


def rank_scores(scores: Sequence[float]) -> list[int]:
    """Return the rank of each score: the highest has 1, and equal scores share a rank."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]
