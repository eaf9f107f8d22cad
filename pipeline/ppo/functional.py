"""The mathematics of PPO, without a model in it.

Shapes are (B, T): B answers, T response tokens, with a boolean `mask` that is True on real tokens. Scalars are 0-d tensors.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]


class PolicyLoss(NamedTuple):
    """`loss` carries the gradient; the fraction of clipped tokens and the approximate KL to the old policy (k3) do not."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class ValueLoss(NamedTuple):
    """`loss` carries the gradient; the fraction of clipped values does not."""

    loss: Tensor
    clip_fraction: Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Per-token estimate (B, T) of KL(policy ‖ reference) from samples of the policy.

    k1 = log p − log q, k2 = k1²/2, k3 = exp(−k1) − 1 + k1 (Schulman, "Approximating KL divergence", 2020).
    """
    k1 = logprobs - ref_logprobs
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1.square() / 2
    if kind == "k3":
        return torch.expm1(-k1) + k1
    raise ValueError(f"kind={kind!r}: expected k1, k2 or k3")


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return (B,) log p − log q summed over each response (k1): an unbiased sample of its KL, in nats.

    Both inputs are (B, T) and 0 off the mask.
    """
    return (logprobs - ref_logprobs).sum(1)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: Tensor | float) -> Tensor:
    """Rewards (B, T): −kl_coef · kl on each real token, plus the score (B,) on the last real one (Ziegler et al. 2019, eq. 2)."""
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    last = mask.cumsum(1).argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, torch.where(mask.any(1), scores.to(rewards), 0.0).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T) and zero off the mask (Schulman et al. 2016, eq. 16).

    The value after the last real token is 0, and nothing behind the mask is read. Returns are advantages + values, before any whitening.
    """
    rewards, values = (torch.where(mask, x, torch.zeros_like(x)) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + gamma * lam * following_advantage, 0.0)
        following_value, following_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`x` (B, T) at unit variance over its real tokens, zero off the mask; the mean is kept unless `shift_mean`.

    In a distributed run the moments are those of all ranks together.
    """
    real = torch.where(mask, x, torch.zeros_like(x)).double()
    count, total, squares = _sum_over_ranks(
        torch.stack([mask.sum().double(), real.sum(), real.square().sum()])
    )
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    white = (real - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)
    return torch.where(mask, white.to(x.dtype), torch.zeros_like(x))


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None = None, num_tokens: Tensor | float | None = None,
) -> PolicyLoss:  # fmt: skip
    """The clipped surrogate max(−Aρ, −A·clip(ρ, 1 − clip_low, 1 + clip_high)) (Schulman et al. 2017, eq. 7).

    Summed over real tokens and divided by `num_tokens` (default: the mask's sum), so that micro-batches add up. `dual_clip` bounds the
    loss of negative advantages at −dual_clip · A (Ye et al. 2020, eq. 5).
    """
    count = mask.sum() if num_tokens is None else num_tokens
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    with torch.no_grad():
        clip_fraction = _masked_sum(clipped > plain, mask) / count
        approx_kl = _masked_sum(torch.expm1(log_ratio) - log_ratio, mask) / count
    return PolicyLoss(_masked_sum(loss, mask) / count, clip_fraction, approx_kl)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    num_tokens: Tensor | float | None = None,
) -> ValueLoss:
    """½ · max((v − R)², (clip(v, v_old ± clip) − R)²), summed over real tokens and divided by `num_tokens` (default: the mask's sum)."""
    count = mask.sum() if num_tokens is None else num_tokens
    values, old_values, returns = (
        torch.where(mask, x, torch.zeros_like(x)) for x in (values, old_values, returns)
    )
    near = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    clip_fraction = _masked_sum(clipped > plain, mask).detach() / count
    return ValueLoss(0.5 * _masked_sum(torch.maximum(plain, clipped), mask) / count, clip_fraction)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distributions in `logits` (..., V) -> (...)."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def next_kl_coef(coef: float, kl: float, target: float | None, horizon: float, responses: int) -> float:
    """Return the KL coefficient after a rollout of `responses` with a mean KL of `kl` nats per response.

    It moves towards `target` nats (Ziegler et al. 2019, section 2.2); without a target it stays.
    """
    if target is None:
        return coef
    error = max(-0.2, min(0.2, kl / target - 1))
    return coef * (1 + error * responses / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − v) / Var(R) over real tokens: 1 is a perfect critic, 0 one that knows the mean."""
    residual, target = (returns - values)[mask], returns[mask]
    return 1 - residual.var(correction=0) / target.var(correction=0).clamp_min(math.ulp(1.0))


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def _sum_over_ranks(x: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x
