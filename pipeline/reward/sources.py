"""Reward sources: anything that scores answers, behind TRL's reward function signature.

`(prompts, completions, completion_ids, ended, **columns) -> list[float]`: the user's prompts (never the policy's markup), the
answers as text, their token ids, whether each ended by itself, and the other columns of the prompt's record.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.reward.model import RewardModel

RewardFunction = Callable[..., Sequence[float]]


class RewardSource(NamedTuple):
    """A reward function, and the mean and standard deviation of its reward on a reference sample (0 and 1 where unknown)."""

    score: RewardFunction
    mean: float = 0.0
    std: float = 1.0


def open_source(spec: str, **options: Any) -> RewardSource:
    """`module:function`, a reward artifact's folder, or a hub id. Raises `UserError`."""
    if is_function(spec):
        return RewardSource(function(spec))
    return from_model(RewardModel.load(spec, **options))


def from_model(model: RewardModel) -> RewardSource:
    """A reward model as a source: whatever its tokenizer, it reads the text."""

    def score(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        return model.score(prompts, completions)

    known, alpha = model.settings, model.settings.alpha
    return RewardSource(score, alpha * (known.reward_mean or 0.0), abs(alpha) * (known.reward_std or 1.0))


def is_function(spec: str) -> bool:
    module, colon, name = spec.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def function(spec: str) -> RewardFunction:
    """The function named `module:function`. Raises `UserError`."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{spec}: {error}; expected module:function on the Python path") from None
    if not callable(found):
        raise UserError(f"{spec}: is a {type(found).__name__}, expected a function (prompts, completions, **columns) -> list of float")
    return found
