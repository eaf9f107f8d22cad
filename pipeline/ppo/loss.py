"""The PPO loss: policy + vf_coef · value − entropy_coef · entropy + ptx_coef · pretraining."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.ppo import functional
from pipeline.ppo.actor_critic import Outputs
from pipeline.ppo.config import PPOConfig


def ppo_loss(
    out: Outputs, batch: Mapping[str, Any], args: PPOConfig, value_only: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a micro-batch, and its metrics under TRL's names.

    `batch` holds the rollout's `logprobs`, `values`, `advantages`, `returns` and `response_mask`, (b, T)
    each. `num_tokens` of it is the number of real tokens of the minibatch on all ranks. Every term is a sum
    over tokens divided by that number, so that micro-batches and ranks add up to their minibatch. With
    `value_only`, during the warm-up of the critic, only the value loss counts; if the warm-up fits fixed
    returns, values are not clipped. `batch` also holds `importance_weights` (b, T) if an engine sampled; they
    multiply the policy loss of each token.
    """
    mask, tokens = batch["response_mask"].bool(), batch["num_tokens"]
    policy = functional.policy_loss(
        out.logprobs,
        batch["logprobs"],
        batch["advantages"],
        mask,
        args.clip_low,
        args.clip_high,
        args.dual_clip,
        num_tokens=tokens,
        weights=batch.get("importance_weights"),
    )
    clip = None if value_only and args.critic_warmup_patience is not None else args.clip_value
    value = functional.value_loss(
        out.values, batch["values"], batch["returns"], mask, clip, num_tokens=tokens
    )
    entropy = torch.where(mask, out.entropy, 0.0).sum() / tokens

    loss = policy.loss - args.entropy_coef * entropy if args.entropy_coef else policy.loss
    metrics = {
        "loss/policy_avg": policy.loss,
        "loss/value_avg": value.loss,
        "policy/approxkl_avg": policy.approx_kl,
        "policy/clipfrac_avg": policy.clip_fraction,
        "policy/entropy_avg": entropy,
        "val/clipfrac_avg": value.clip_fraction,
    }
    if out.demonstration_logprobs is not None:
        metrics["loss/ptx_avg"] = -out.demonstration_logprobs.sum() / batch["demonstration_tokens"]
        loss = loss + args.ptx_coef * metrics["loss/ptx_avg"]

    # At weight 0 the other terms still take part: DDP waits for the gradient of every parameter.
    return (0.0 if value_only else 1.0) * loss + args.vf_coef * value.loss, metrics
