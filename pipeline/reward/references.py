"""Rewards of reference responses to the same prompt, for `transform: sigmoid`."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.reward.calls import OF_TRAINERS
from pipeline.reward.token_rewards import quote

Scores = list[float | None]  # the rewards of the reference responses to a prompt, None for no reward


class ReferenceScores:
    """The rewards of `count` reference responses to each prompt, by the `record_keys` of its record."""

    def __init__(self, count: int):
        self.count = count
        self.scores: dict[str, Scores] = {}

    def find_scores(self, prompts: Sequence[Any], columns: dict[str, Any]) -> list[Scores]:
        """Return the rewards for each prompt. Raises `UserError` if there are none for a prompt."""
        keys = record_keys(prompts, columns)
        for prompt, key in zip(prompts, keys, strict=True):
            if key not in self.scores:
                raise UserError(
                    f"transform: sigmoid: no reference response was sampled for the prompt {quote(prompt)}; "
                    "expected a prompt of the training or evaluation data"
                )
        return [self.scores[key] for key in keys]


def record_keys(prompts: Sequence[Any], columns: dict[str, Any]) -> list[str]:
    """Return a digest of the record of each prompt: the prompt and its columns for reward functions."""
    names = sorted(columns.keys() - OF_TRAINERS.keys())
    rows = zip(prompts, *(columns[name] for name in names), strict=True)
    texts = (json.dumps([names, *row], sort_keys=True, default=str) for row in rows)
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


def preference(reward: float, references: Scores, std: float) -> float | None:
    """Return the mean over the references of σ((reward − reference) / std), or None without a reference.

    For a reward model that learned from pairs, σ is the probability that the response is preferred to the
    reference. Fu et al. 2025, "Reward Shaping to Mitigate Reward Hacking in RLHF" (PAR), arXiv 2502.18770.
    """
    wins = [_sigmoid((reward - reference) / std) for reference in references if reference is not None]
    return math.fsum(wins) / len(wins) if wins else None


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))  # never overflows
    return 1 / (1 + small) if x >= 0 else small / (1 + small)
