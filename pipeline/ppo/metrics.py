"""The metrics of a rollout, over real tokens, under the names that TRL's PPO gave them."""

import statistics

import torch

from pipeline.ppo import functional
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.rollout import Rollout


def rollout_metrics(rollout: Rollout, kl_coef: float, args: PPOConfig, eos_token_id: int) -> dict[str, float]:
    """Return the metrics of one rollout of this process; KL is in nats per response."""
    mask, responses = rollout.mask, rollout.responses
    kl = functional.kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
    penalty = -kl_coef * torch.where(mask, kl, 0.0).sum(1)
    is_eos = responses.response_ids == eos_token_id
    metrics = {
        "objective/kl": rollout.kl.mean(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": rollout.entropy[mask].mean(),
        "objective/scores": rollout.scores.mean(),
        "objective/raw_scores": statistics.fmean(rollout.raw_scores),
        "objective/non_score_reward": penalty.mean(),
        "objective/rlhf_reward": (rollout.scores + penalty).mean(),
        "response/tokens": mask.sum(1).float().mean(),
        "response/ended_fraction": statistics.fmean(responses.ended),
        "val/num_eos_tokens": (is_eos & mask).sum() * args.world_size,
        "val/explained_variance": functional.explained_variance(rollout.values, rollout.returns, mask),
    }
    return {name: float(value) for name, value in metrics.items()}
