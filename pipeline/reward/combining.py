"""Combine several rewards into one: each is named, normalized and clipped, and then weighted and summed."""

import operator
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config import Reward
from pipeline.errors import UserError
from pipeline.reward.calls import ResponseReward, call_reward_functions
from pipeline.reward.functions import RewardSource
from pipeline.reward.token_rewards import spread_reward, total_reward


def combine_rewards(
    sources: Sequence[RewardSource],
    weights: Sequence[float] | None = None,
    uncertainty_penalty: float = 0.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RewardSource:
    """Combine sources into one: their weighted sum, less `uncertainty_penalty` standard deviations of them.

    `weights` defaults to 1/n for n sources. Penalty: Coste et al. 2023, "Reward Model Ensembles Help Mitigate
    Overoptimization". Only differences of a reward are meaningful, so each score is centred on its reference
    sample before the standard deviation is taken.

    A reward of None adds nothing to the sum and does not enter the standard deviation. If all are None, so is
    the sum. `async` functions run concurrently.

    Each source's `shape` is applied first. Its mean over the responses is logged by `log_metric`, which TRL's
    trainers and PPO pass.

    If a source gives rewards inside a response, the sum is per token, and the penalty, of the sums over
    tokens, is on the last token. The policy's `tokenizer` places the rewards of steps; without one they count
    as their sum.
    """
    if len(sources) == 1 and weights is None and sources[0].shape is None:
        return sources[0]
    weights = weights or [1 / len(sources)] * len(sources)

    def score(
        prompts: Any, completions: Any, completion_ids: Any, ended: Any, **columns: Any
    ) -> list[ResponseReward | None]:
        batch = (prompts, completions, completion_ids, ended, columns, tokenizer)
        scores = call_reward_functions([source.score for source in sources], *batch)
        _log_means(sources, scores, columns.get("log_metric"))
        rewards = [_shape_all(source, values) for source, values in zip(sources, scores, strict=True)]
        combined: list[ResponseReward | None] = []
        for row, ids in zip(zip(*rewards, strict=True), completion_ids, strict=True):
            valid = [
                (weight, value, source.mean)
                for weight, value, source in zip(weights, row, sources, strict=True)
                if value is not None
            ]
            if not valid:
                combined.append(None)
                continue
            disagreement = statistics.pstdev(total_reward(value) - mean for _, value, mean in valid)
            penalty = uncertainty_penalty * disagreement
            present, values, _ = zip(*valid, strict=True)
            combined.append(_weighted_sum(present, values, len(ids), penalty))
        return combined

    mean = sum(weight * source.mean for weight, source in zip(weights, sources, strict=True))
    # An upper bound: the standard deviation of the sum of perfectly correlated rewards.
    std = sum(abs(weight) * source.std for weight, source in zip(weights, sources, strict=True))
    return RewardSource(score, mean, std)


def shape_source(source: RewardSource, reward: Reward, label: str, name: str) -> RewardSource:
    """Return a source for a sum: with its name, and normalized and clipped as its section says.

    Raises `UserError` if it is to be normalized and has no reference sample.
    """
    if not reward.is_shaped:
        return source._replace(name=name)
    mean, std = 0.0, 1.0
    if reward.normalize == "reference":
        mean, std = source.mean, source.std
        if (mean, std) == (0.0, 1.0):
            raise UserError(
                f"{label}: normalize: reference needs the reference sample of a reward stage, and this model "
                "has none; remove it, and scale the reward by its weight"
            )
        source = source._replace(mean=0.0, std=1.0)
    return source._replace(name=name, shape=partial(shape_reward, mean=mean, std=std, clip=reward.clip))


def shape_reward(reward: ResponseReward, mean: float, std: float, clip: float | None) -> ResponseReward:
    """Return (reward − mean) / std, clipped to ± `clip`.

    Of the rewards of tokens, all are divided, the mean is subtracted on the last one, and each is clipped.
    """
    is_list = isinstance(reward, list)
    values = list(reward) if isinstance(reward, list) else [reward]
    if values:
        values[-1] -= mean
    values = [value / std for value in values]
    if clip is not None:
        values = [min(max(value, -clip), clip) for value in values]
    return values if is_list else values[0]


def _shape_all(
    source: RewardSource, rewards: Sequence[ResponseReward | None]
) -> Sequence[ResponseReward | None]:
    if source.shape is None:
        return rewards
    return [None if reward is None else source.shape(reward) for reward in rewards]


def _log_means(
    sources: Sequence[RewardSource],
    rewards: Sequence[Sequence[ResponseReward | None]],
    log_metric: Callable[[str, float], Any] | None,
) -> None:
    """Log the mean of each named source's rewards, without those that are None."""
    for source, column in zip(sources, rewards, strict=True):
        values = [total_reward(reward) for reward in column if reward is not None]
        if log_metric and source.name and values:
            log_metric(f"rewards/{source.name}", statistics.fmean(values))


def _weighted_sum(
    weights: Sequence[float], rewards: Sequence[ResponseReward], tokens: int, penalty: float
) -> ResponseReward:
    """Return the weighted sum of the rewards of one response, less a penalty on its last token.

    It is a number if all rewards are, else one number per token.
    """
    if not any(isinstance(reward, list) for reward in rewards):
        return sum(map(operator.mul, weights, rewards)) - penalty
    rows = [spread_reward(reward, tokens) for reward in rewards]
    combined = [sum(map(operator.mul, weights, column)) for column in zip(*rows, strict=True)]
    if combined:
        combined[-1] -= penalty
    return combined
