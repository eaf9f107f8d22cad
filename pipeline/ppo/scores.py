"""Scores that PPO learns from: raw rewards, normalized, clipped, and lowered if the EOS is missing."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.ppo.config import PPOConfig
from pipeline.reward.functions import RewardSource


def normalize_scores(
    raw: Tensor,
    ended: Sequence[bool],
    args: PPOConfig,
    reward: RewardSource,
    running_sums: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return (B,) fp32 scores for (B,) raw rewards in fp64.

    `score_normalization` "reference" uses the mean and standard deviation of the reward's reference sample;
    "running" uses those of all scores so far. `running_sums` holds the number, sum and sum of squares of
    these; it is updated in place, and `reduce` sums over all ranks. Then scores are clipped to ±
    `score_clip`, and `missing_eos_penalty` is subtracted if a response did not end.
    """
    scores = raw
    if args.score_normalization == "reference":
        scores = (scores - reward.mean) / (reward.std or 1.0)

    if args.score_normalization == "running":
        sums = torch.stack([torch.ones_like(scores), scores, scores.square()]).sum(1)
        running_sums += reduce(sums.to(running_sums.device))
        count, total, squares = running_sums.tolist()
        deviation = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
        scores = (scores - total / count) / (deviation or 1.0)

    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    missing_eos = 1 - torch.tensor(ended).double()
    return (scores - args.missing_eos_penalty * missing_eos).float()
