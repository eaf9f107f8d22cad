"""The metrics of a rollout, over real tokens, under the names that TRL's PPO gave them."""

import statistics
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object

from pipeline.ppo import functional
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.rollout import Rollout


def rollout_metrics(
    rollout: Rollout, kl_coef: float, args: PPOConfig, ends: Sequence[int]
) -> dict[str, float]:
    """Return the metrics of one rollout of this process; KL is in nats per response.

    `ends` are the ids that end a response. If an engine sampled, its gap to the trainer is that of all
    processes together.
    """
    mask, responses = rollout.mask, rollout.responses
    kl = functional.kl_estimate(rollout.logprobs, rollout.ref_logprobs, args.kl_estimator)
    penalty = -kl_coef * torch.where(mask, kl, 0.0).sum(1)
    is_end = torch.isin(responses.response_ids, torch.tensor(ends, device=mask.device))
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
        "val/num_eos_tokens": (is_end & mask).sum() * args.world_size,
        "val/explained_variance": functional.explained_variance(rollout.values, rollout.returns, mask),
    }
    if rollout.sampler_log_ratio is not None:
        gap = functional.sampler_gap(rollout.sampler_log_ratio, mask, args.importance_cap)
        metrics |= {
            "sampler/logprob_gap": gap.mean,
            "sampler/logprob_gap_max": gap.largest,
            "sampler/kl": gap.kl,
            "sampler/capped_fraction": gap.capped,
            "sampler/excluded_fraction": gap.excluded,
        }
    if args.critic_warmup_patience is not None:
        metrics["val/r_squared"] = functional.r_squared(rollout.values, rollout.returns, mask)
    return {name: float(value) for name, value in metrics.items()}


def mean_over_processes(metrics: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean of each metric over the values of all processes, which may have other names."""
    values: dict[str, list[float]] = {}
    for part in gather_object([metrics]):
        for name, numbers in part.items():
            values.setdefault(name, []).extend(numbers)
    return {name: statistics.fmean(numbers) for name, numbers in sorted(values.items())}
