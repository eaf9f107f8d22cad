"""The formulas of PPO, as pure functions of tensors.

Shapes are (B, T): B responses of at most T tokens, with a boolean `mask` that is True on real tokens. Scalars
are 0-d tensors.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]


class PolicyLoss(NamedTuple):
    """The policy loss, with gradient, and two metrics without.

    `clip_fraction` is the fraction of clipped tokens. `approx_kl` is the KL to the old policy, estimated by
    k3.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


class SamplerGap(NamedTuple):
    """How far the trainer's log π and a sampler's log μ are apart, in nats, over the tokens of all ranks.

    `mean` and `largest` are of |log π − log μ|. `kl` estimates KL(μ ‖ π) per token by k3. All three leave out
    tokens that the trainer excludes, the share `excluded` of all. `capped` is the share above the cap.
    """

    mean: Tensor
    largest: Tensor
    kl: Tensor
    capped: Tensor
    excluded: Tensor


class ValueLoss(NamedTuple):
    """The value loss, with gradient, and the fraction of clipped values, without."""

    loss: Tensor
    clip_fraction: Tensor


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Return the (B, T) estimate per token of KL(policy ‖ reference) from samples of the policy.

    k1 = log p − log q, k2 = k1²/2, k3 = exp(−k1) − 1 + k1 (Schulman, "Approximating KL divergence", 2020).
    Raises `ValueError` for any other `kind`.
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

    Both inputs are (B, T) and zero off the mask.
    """
    return (logprobs - ref_logprobs).sum(1)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: Tensor | float) -> Tensor:
    """Return (B, T) rewards: the score of each real token, less kl_coef · kl.

    With a score on the last real token alone this is eq. 2 of Ziegler et al. 2019. `scores` and `kl` are
    (B, T), and nothing off the mask is read.
    """
    return _zero_off_mask(-kl_coef * kl, mask) + _zero_off_mask(scores.to(kl), mask)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), both (B, T) and zero off the mask (Schulman et al. 2016, eq. 16).

    `lam` is one number, or (B,) one for each response. The value after the last real token is 0, and nothing
    off the mask is read. Returns are advantages + values, before any whitening.
    """
    rewards, values = _zero_off_mask(rewards, mask), _zero_off_mask(values, mask)
    decay = torch.as_tensor(gamma * lam, dtype=rewards.dtype, device=rewards.device)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + decay * next_advantage, 0.0)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def length_adaptive_lam(mask: Tensor, alpha: float) -> Tensor:
    """Return (B,) λ = 1 − 1 / (alpha · l) for responses of l real tokens, and 0 where that is negative.

    The weights of GAE's temporal differences then sum to alpha · l (VAPO, arXiv:2504.05118).
    """
    return (1 - 1 / (alpha * mask.sum(1).double())).clamp_min(0)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return `x` (B, T) at unit variance over its real tokens, and zero off the mask.

    The mean becomes 0, or stays if not `shift_mean`. In a distributed run the moments are those of all ranks
    together.
    """
    real = _zero_off_mask(x, mask).double()
    moments = torch.stack([mask.sum().double(), real.sum(), real.square().sum()])
    count, total, squares = _sum_over_ranks(moments)

    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    white = (real - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)
    return _zero_off_mask(white.to(x.dtype), mask)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    num_tokens: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Return the clipped surrogate max(−Aρ, −A · clip(ρ, 1 − clip_low, 1 + clip_high)) and its metrics.

    This is eq. 7 of Schulman et al. 2017. The loss is summed over real tokens and divided by `num_tokens`
    (default: the mask's sum), so that micro-batches add up. `dual_clip` bounds the loss of negative
    advantages at −dual_clip · A (Ye et al. 2020, eq. 5). `weights` (B, T) multiply the loss of each
    token, but not the metrics.
    """
    count = mask.sum() if num_tokens is None else num_tokens
    log_ratio = _zero_off_mask(logprobs - old_logprobs, mask)
    ratio = log_ratio.exp()

    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    if weights is not None:
        loss = weights * loss

    with torch.no_grad():
        clip_fraction = _masked_sum(clipped > plain, mask) / count
        approx_kl = _masked_sum(torch.expm1(log_ratio) - log_ratio, mask) / count
    return PolicyLoss(_masked_sum(loss, mask) / count, clip_fraction, approx_kl)


def importance_weights(log_ratio: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Return (B, T) truncated importance weights min(π / μ, cap), zero off the mask.

    `log_ratio` is log π − log μ of tokens that μ sampled, -inf for a token of π's probability 0. The weight
    corrects the choice of each token given those before it (Ionides 2008; Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training").
    """
    return _zero_off_mask(log_ratio.exp().clamp_max(cap), mask)


def sampler_gap(log_ratio: Tensor, mask: Tensor, cap: float | None) -> SamplerGap:
    """Return the `SamplerGap` of `log_ratio` = log π − log μ (B, T), as `importance_weights` takes it.

    The mean and the KL are 0 if the trainer excludes all tokens. Without a `cap` no token is above it.
    """
    kept = mask & log_ratio.isfinite()
    real = _zero_off_mask(log_ratio, kept).double()
    is_capped = kept & (real > (math.inf if cap is None else math.log(cap)))
    kl = kl_estimate(torch.zeros_like(real), real, "k3")
    sums = [mask.sum(), kept.sum(), real.abs().sum(), kl.sum(), is_capped.sum()]
    tokens, count, gaps, kls, capped = _sum_over_ranks(torch.stack([x.double() for x in sums]))
    largest = _max_over_ranks(real.abs().max())
    some = count.clamp_min(1)
    return SamplerGap(gaps / some, largest, kls / some, capped / tokens, (tokens - count) / tokens)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    num_tokens: Tensor | float | None = None,
) -> ValueLoss:
    """Return ½ · max((v − R)², (clip(v, v_old ± clip) − R)²) and the fraction of clipped values.

    Without a `clip` it is ½ · (v − R)². The loss is summed over real tokens and divided by `num_tokens`
    (default: the mask's sum).
    """
    count = mask.sum() if num_tokens is None else num_tokens
    values, old_values, returns = (_zero_off_mask(x, mask) for x in (values, old_values, returns))

    plain = clipped = (values - returns).square()
    if clip is not None:
        near = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
        clipped = (near - returns).square()
    clip_fraction = _masked_sum(clipped > plain, mask).detach() / count
    return ValueLoss(0.5 * _masked_sum(torch.maximum(plain, clipped), mask) / count, clip_fraction)


def entropy(logits: Tensor) -> Tensor:
    """Return the (...) entropies, in nats, of the distributions in `logits` (..., V)."""
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
    """Return 1 − Var(R − v) / Var(R) over the real tokens of all ranks together.

    It is 1 for a perfect critic and 0 for one that predicts the mean.
    """
    residual, target = _variance(returns - values, mask), _variance(returns, mask)
    return 1 - residual / target.clamp_min(math.ulp(1.0))


def r_squared(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return 1 − E[(R − v)²] / Var(R) over the real tokens of all ranks together.

    It is the explained variance less what a wrong mean of the values costs: equal to it without such a bias.
    """
    squares = (returns - values)[mask].double().square()
    count, total = _sum_over_ranks(torch.stack([mask.sum().double(), squares.sum()]))
    return 1 - total / count / _variance(returns, mask).double().clamp_min(math.ulp(1.0))


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    """Return the variance over the real tokens of all ranks, by the law of total variance.

    On one rank it is the very number that `Tensor.var` returns.
    """
    real = x[mask]
    mean, variance = real.mean().double(), real.var(correction=0).double()
    count, total = _sum_over_ranks(torch.stack([mask.sum().double(), mask.sum() * mean]))
    within_and_between = mask.sum() * (variance + (mean - total / count).square())
    return (_sum_over_ranks(within_and_between) / count).to(x.dtype)


def _zero_off_mask(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, torch.zeros_like(x))


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    return _zero_off_mask(x, mask).sum()


def _sum_over_ranks(x: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def _max_over_ranks(x: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX)
    return x
