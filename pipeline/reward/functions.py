"""Reward sources: anything that scores answers, behind TRL's reward function signature.

`(prompts, completions, completion_ids, ended, **columns) -> list[float]`: the user's prompts (never the policy's markup), the
answers as text, their token ids, whether each ended by itself, and the other columns of the prompt's record.
"""

import math
import operator
import statistics
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from pipeline.artifacts.inputs import require_artifact as require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.config import Reward
from pipeline.errors import UserError
from pipeline.reward.model import RewardModel
from pipeline.reward.remote import load_remote, require_remote

RewardFunction = Callable[..., Sequence[float]]


class RewardSource(NamedTuple):
    """A reward function, the mean and standard deviation of its reward on a reference sample (0 and 1 where unknown), and the model behind
    it, where there is one."""

    score: RewardFunction
    mean: float = 0.0
    std: float = 1.0
    model: RewardModel | None = None


def require_reward(reward: Reward, fix: str, trust_remote_code: bool = False) -> Artifact:
    """A reward model as an input of a stage; `fix` is the command that makes it. A server is asked for a score. Raises `UserError`."""
    return (
        require_remote(reward, fix, trust_remote_code)
        if reward.is_url
        else require_artifact(reward.source, "reward", fix)
    )


def load_reward(reward: Reward, opened: Artifact, **options: Any) -> RewardModel:
    """The reward model that `require` opened; `options` go to `RewardModel.load`. Raises `UserError`."""
    if reward.is_url:
        return load_remote(reward, opened, **options)
    return RewardModel.load(
        opened.path, revision=opened.revision, positive_label=reward.positive_label, **options
    )


def reward_from_model(model: RewardModel, length_penalty: float = 0.0) -> RewardSource:
    """A reward model as a source: whatever its tokenizer, it reads the text.

    `length_penalty` takes off so much of what an answer's length alone is worth to it, by the slope on its reference sample: 1 all of it.
    Raises `UserError` where no slope is known.
    """
    known, alpha = model.settings, model.settings.alpha
    if length_penalty and (known.length_slope is None or known.length_mean is None):
        raise UserError(
            "length_penalty: this reward model knows no reference sample to fit it on; run the reward stage again"
        )

    def score(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        found = model.score(prompts, completions)
        if not length_penalty:
            return found
        worth = alpha * length_penalty * (known.length_slope or 0.0)
        more = [length - (known.length_mean or 0.0) for length in model.lengths(completions)]
        return [value - worth * tokens for value, tokens in zip(found, more, strict=True)]

    return RewardSource(
        score, alpha * (known.reward_mean or 0.0), abs(alpha) * (known.reward_std or 1.0), model
    )


def combine_rewards(
    sources: Sequence[RewardSource], weights: Sequence[float] | None = None, uncertainty_penalty: float = 0.0
) -> RewardSource:
    """Several as one: the sum of `weights` (1/n each where not given) × score, less `uncertainty_penalty` standard deviations between them
    (Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization").

    Only differences of a reward mean anything, so that each is centred on its reference sample before their spread is taken.
    """
    if len(sources) == 1 and weights is None:
        return sources[0]
    weights = weights or [1 / len(sources)] * len(sources)

    def score(**answers: Any) -> list[float]:
        columns = [list(map(float, source.score(**answers))) for source in sources]
        found = []
        for row in zip(*columns, strict=True):
            spread = statistics.pstdev(
                value - source.mean for value, source in zip(row, sources, strict=True)
            )
            found.append(sum(map(operator.mul, weights, row)) - uncertainty_penalty * spread)
        return found

    # Of the sum's own spread only a bound is known: that of rewards which rise and fall together.
    std = sum(abs(weight) * source.std for weight, source in zip(weights, sources, strict=True))
    return RewardSource(
        score, sum(weight * source.mean for weight, source in zip(weights, sources, strict=True)), std
    )


def call_reward_function(
    function: RewardFunction, prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Sequence[int]],
    ended: Sequence[bool], columns: dict[str, Any],
) -> list[float]:  # fmt: skip
    """The scores of a function, one finite number for each answer. Raises `UserError`."""
    given = columns | {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "ended": ended,
    }
    try:
        scores = [float(score) for score in function(**given)]
    except TypeError as error:
        signature = "(prompts, completions, completion_ids, ended, **columns) -> list of float"
        raise UserError(
            f"the reward cannot be called, or gives no numbers: {error}; expected {signature}"
        ) from error
    if len(scores) != len(prompts):
        raise UserError(f"the reward gave {len(scores)} scores for {len(prompts)} answers; expected as many")
    for score, prompt, text in zip(scores, prompts, completions, strict=True):
        if not math.isfinite(score):
            raise UserError(
                f"the reward of the answer {text!r} to {prompt!r} is {score}; expected a finite number"
            )
    return scores


def import_function(spec: str) -> RewardFunction:
    """The function named `module:function`. Raises `UserError`."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{spec}: {error}; expected module:function on the Python path") from None
    if not callable(found):
        raise UserError(
            f"{spec}: is a {type(found).__name__}, expected a function (prompts, completions, **columns) -> list of float"
        )
    return found
