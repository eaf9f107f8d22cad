"""From raw rewards to the scores that PPO learns from: normalized, clipped, penalized for a missing EOS."""

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

    `score_normalization` "reference" uses the mean and deviation of the reward's reference sample; "running" those of
    all scores so far, whose number, sum and sum of squares are `running_sums`, updated here over all ranks by `reduce`.
    Then scores are clipped to ± `score_clip`, and `missing_eos_penalty` is subtracted if a response did not end.
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
    return (scores - args.missing_eos_penalty * (1 - torch.tensor(ended).double())).float()
