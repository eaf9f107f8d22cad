"""The PPO loss of a micro-batch: policy + vf_coef · value − entropy_coef · entropy + ptx_coef · pretraining."""

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
    """Return the loss of a micro-batch and its metrics under TRL's names.

    `batch` holds what the rollout recorded, (b, T) each, and `num_tokens`, the real tokens of the minibatch on all
    ranks. Every term is a sum over tokens divided by that number, so that micro-batches and ranks add up to their
    minibatch. `value_only` leaves the value loss alone, during the warm-up of the critic.
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
    )
    value = functional.value_loss(
        out.values, batch["values"], batch["returns"], mask, args.clip_value, num_tokens=tokens
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
    if out.demonstrations is not None:
        metrics["loss/ptx_avg"] = -out.demonstrations.sum() / batch["demonstration_tokens"]
        loss = loss + args.ptx_coef * metrics["loss/ptx_avg"]
    # During the warm-up the policy's loss counts nothing, yet all of the model takes part: DDP waits for every gradient.
    return (0.0 if value_only else 1.0) * loss + args.vf_coef * value.loss, metrics
