"""Combine several rewards into one: each is logged by its name, shaped, and then weighted and summed."""

import operator
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

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

    Each source's `shape` is applied first; running statistics learn from `for_training` alone. A source with
    a name is logged as it was before: its mean over the responses by `log_metric`, and all of it by
    `log_extra`, where these are passed.

    If a source gives rewards inside a response, the sum is per token, and the penalty, of the sums over
    tokens, is on the last token. The policy's `tokenizer` places the rewards of steps; without one they count
    as their sum.
    """
    if len(sources) == 1 and weights is None and sources[0].shape is None:
        return sources[0]
    weights = weights or [1 / len(sources)] * len(sources)

    def score(
        is_training: bool, /, prompts: Any, completions: Any, completion_ids: Any, ended: Any, **columns: Any
    ) -> list[ResponseReward | None]:
        batch = (prompts, completions, completion_ids, ended, columns, tokenizer)
        scores = call_reward_functions([source.score for source in sources], *batch)
        _log_rewards(sources, scores, columns.get("log_metric"), columns.get("log_extra"))
        rewards = [
            values if source.shape is None else source.shape.apply(values, prompts, columns, is_training)
            for source, values in zip(sources, scores, strict=True)
        ]
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
    source = RewardSource(partial(score, False), mean, std)
    return source._replace(parts=tuple(sources), training_score=partial(score, True))


def _log_rewards(
    sources: Sequence[RewardSource],
    rewards: Sequence[Sequence[ResponseReward | None]],
    log_metric: Callable[[str, float], Any] | None,
    log_extra: Callable[[str, list[float | None]], Any] | None,
) -> None:
    """Log each named source's rewards, and their mean without those that are None."""
    for source, column in zip(sources, rewards, strict=True):
        if not source.name:
            continue
        totals = [None if reward is None else total_reward(reward) for reward in column]
        values = [total for total in totals if total is not None]
        if log_metric and values:
            log_metric(f"rewards/{source.name}", statistics.fmean(values))
        if log_extra:
            log_extra(f"rewards/{source.name}", totals)


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
