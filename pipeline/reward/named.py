"""Names of rewards in errors: `reward[1] (http://host:8000)`, the config's key and the source behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pipeline.errors import UserError


class NamedReward(partial[Any]):
    """A reward function of a config; errors of its calls begin with `label`."""

    label: str


def label_reward(key: str, source: str) -> str:
    """Return how errors name the reward at `key` of a config."""
    return f"{key} ({source})"


def name_reward(function: Any, label: str) -> NamedReward:
    """Return `function` with the label that its errors begin with."""
    named = NamedReward(function)
    named.label = label
    return named


@contextmanager
def explain_reward(label: str) -> Iterator[None]:
    """Begin the message of a `UserError` in this block with the label of the reward that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(prefix_label(label, str(error))) from error


def prefix_label(label: str, message: str) -> str:
    """Return the message behind the label, without a source that the label names already."""
    source = label.partition(" (")[2].removesuffix(")")
    return f"{label}: {message.removeprefix(f'{source}: ')}"
