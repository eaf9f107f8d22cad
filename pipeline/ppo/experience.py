"""A scored rollout, and how it is cut into minibatches and micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.ppo import math as ppo
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.config import PPOConfig
from pipeline.sampling import Answers, permutation

Plan = list[list[list[int]]]  # of one PPO epoch: the rows of each micro-batch of each minibatch


@dataclass
class Experience:
    """A scored rollout of B answers; all but `answers` and `scores` (B,) are (B, T)."""

    answers: Answers
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def mask(self) -> Tensor:
        return self.answers.response_mask.bool()

    @property
    def kl(self) -> Tensor:
        """(B,) log p − log q summed over each answer (k1): a sample of its KL to the reference, in nats."""
        return (self.logprobs - self.ref_logprobs).sum(1)


def plan(answers: Answers, args: PPOConfig, rollout: int, ppo_epoch: int) -> Plan:
    """Minibatches partition the rollout; each is cut into micro-batches of like lengths."""
    lengths = (answers.query_mask.sum(1) + answers.response_mask.sum(1)).tolist()
    micro, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps
    minibatches: list[list[int]] = [[] for _ in range(args.num_mini_batches)]
    for part in range(parts):  # each shuffled by itself, by its number among those of all processes: whose it is changes no minibatch
        start = part * micro * args.num_mini_batches
        order = permutation(micro * args.num_mini_batches, args.seed, "minibatches", rollout, ppo_epoch, args.process_index * parts + part)
        for number, minibatch in enumerate(minibatches):
            minibatch += [start + row for row in order[number * micro : (number + 1) * micro]]
    by_length = [sorted(minibatch, key=lambda row: lengths[row]) for minibatch in minibatches]
    return [[minibatch[start : start + micro] for start in range(0, len(minibatch), micro)] for minibatch in by_length]


@torch.no_grad()
def assess(actor: ActorCritic, answers: Answers, scores: Tensor, args: PPOConfig, rollout: int, autocast: Any) -> Experience:
    """Log-probabilities, values, advantages and returns, computed in the very micro-batches of the first PPO epoch: the ratio of its
    first minibatch is then 1 to the bit."""
    actor.train()
    shape, device = answers.response_ids.shape, answers.response_ids.device
    logprobs, ref_logprobs, values, entropy = (torch.zeros(shape, device=device) for _ in range(4))
    for rows in (rows for minibatch in plan(answers, args, rollout, 0) for rows in minibatch):
        inputs = _trim(answers, rows)
        width = inputs["response_ids"].shape[1]
        with autocast():
            out = actor(**inputs, temperature=args.temperature)
            ref_logprobs[rows, :width] = actor.reference_logprobs(**inputs, temperature=args.temperature)
        logprobs[rows, :width], values[rows, :width], entropy[rows, :width] = out.logprobs, out.values, out.entropy
    mask = answers.response_mask.bool()
    kl = ppo.kl_estimate(logprobs, ref_logprobs, args.kl_estimator)
    rewards = ppo.shape_rewards(scores, kl, mask, float(actor.kl_coef))
    advantages, returns = ppo.gae(rewards, values, mask, args.gamma, args.lam)
    return Experience(answers, scores, logprobs, ref_logprobs, values, entropy, ppo.whiten(advantages, mask), returns)


def minibatches(experience: Experience, args: PPOConfig, rollout: int) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of each minibatch, in the order they are trained on."""
    for ppo_epoch in range(args.num_ppo_epochs):
        for minibatch in plan(experience.answers, args, rollout, ppo_epoch):
            yield [_micro_batch(experience, rows) for rows in minibatch]


def _micro_batch(experience: Experience, rows: list[int]) -> dict[str, Any]:
    inputs: dict[str, Any] = _trim(experience.answers, rows)
    width = inputs["response_ids"].shape[1]
    for name in ("logprobs", "values", "advantages", "returns"):
        inputs[name] = getattr(experience, name)[rows, :width]
    return inputs | {"rows": rows}


def _trim(answers: Answers, rows: list[int]) -> dict[str, Tensor]:
    """The four tensors of some rows, without the padding that none of them needs."""
    queries = int(answers.query_mask[rows].sum(1).max())
    responses = int(answers.response_mask[rows].sum(1).max())
    return {
        "query_ids": answers.query_ids[rows][:, -queries:], "query_mask": answers.query_mask[rows][:, -queries:],
        "response_ids": answers.response_ids[rows][:, :responses], "response_mask": answers.response_mask[rows][:, :responses],
    }  # fmt: skip
