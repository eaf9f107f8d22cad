"""Scores that PPO learns from: raw rewards, normalized, clipped, and lowered if the EOS is missing.

A reward of a whole response is on its last token. So a number r and the token rewards [0, …, 0, r] are the
same reward, to the bit.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.ppo.config import PPOConfig
from pipeline.reward.calls import ResponseReward
from pipeline.reward.functions import RewardSource
from pipeline.reward.token_rewards import spread_reward


def token_rewards(rewards: Sequence[ResponseReward], mask: Tensor) -> Tensor:
    """Return the raw rewards of B responses as a (B, T) tensor in fp64, 0 off the (B, T) mask."""
    raw = torch.zeros(mask.shape, dtype=torch.float64)
    for row, (reward, tokens) in enumerate(zip(rewards, mask.sum(1).tolist(), strict=True)):
        raw[row, :tokens] = torch.tensor(spread_reward(reward, tokens), dtype=torch.float64)
    return raw


def normalize_scores(
    raw: Tensor,
    mask: Tensor,
    ended: Sequence[bool],
    args: PPOConfig,
    reward: RewardSource,
    running_sums: Tensor,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return (B, T) fp32 scores for (B, T) raw rewards in fp64 of tokens, 0 off the (B, T) mask.

    The score of a response is the sum over its tokens, and all statistics are those of such sums.
    `score_normalization` "reference" uses the mean and standard deviation of the reward's reference sample;
    "running" uses those of all responses so far. `running_sums` holds the number, sum and sum of squares of
    these; it is updated in place, and `reduce` sums over all ranks.

    The mean is subtracted on the last token, and all tokens are divided by the standard deviation. Then the
    score of each token is clipped to ± `score_clip`, and `missing_eos_penalty` is subtracted on the last
    token if a response did not end.
    """
    mean, deviation = 0.0, 1.0
    if args.score_normalization == "reference":
        mean, deviation = reward.mean, reward.std

    if args.score_normalization == "running":
        totals = raw.sum(1)
        sums = torch.stack([torch.ones_like(totals), totals, totals.square()]).sum(1)
        running_sums += reduce(sums.to(running_sums.device))
        count, total, squares = running_sums.tolist()
        mean, deviation = total / count, math.sqrt(max(squares / count - (total / count) ** 2, 0.0))

    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    scores = (raw - mean * is_last.double()) / (deviation or 1.0)
    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    missing_eos = 1 - torch.tensor(ended).double()
    return (scores - args.missing_eos_penalty * missing_eos.unsqueeze(1) * is_last).float()
