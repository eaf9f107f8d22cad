"""The steps of a response: its text, and the offset in it at which each step ends."""

from collections.abc import Sequence
from typing import Any

from pipeline.data.schema import Text
from pipeline.errors import UserError


def read_steps(response: Any, separator: str) -> tuple[Text, list[int]]:
    """Return a response as text or messages, and the offset in its text at which each step ends.

    A list of strings is the steps, and its text is the steps joined by `separator`. Other text is split by
    it: a piece without visible text is no step, and a response without any is one step. Of several messages
    the last one is split. Raises `UserError` if there are no steps.
    """
    if isinstance(response, str):
        return response, split_steps(response, separator)
    if not len(response):
        raise UserError("a response has no steps; expected a text, or a list of one step or more")
    if isinstance(response[0], str):
        return separator.join(response), step_ends(response, separator)
    return response, split_steps(response[-1]["content"], separator)


def step_ends(steps: Sequence[str], separator: str) -> list[int]:
    """Return the offset at which each step ends in the text of the steps joined by `separator`.

    >>> step_ends(["7+5=2", "2-3=9"], " ")
    [5, 11]
    """
    ends, length = [], 0
    for step in steps:
        ends.append(length + len(step))
        length += len(step) + len(separator)
    return ends


def split_steps(text: str, separator: str) -> list[int]:
    """Return the offset in a text at which each of its steps ends.

    >>> split_steps("7+5=2 2-3=9 ", " ")
    [5, 11]
    """
    pieces = text.split(separator)
    ends = step_ends(pieces, separator)
    return [end for piece, end in zip(pieces, ends, strict=True) if piece.strip()] or [len(text)]
