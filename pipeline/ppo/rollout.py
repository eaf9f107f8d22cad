"""A scored rollout, and how it is cut into minibatches and micro-batches."""

"""The stream of micro-batches that the Trainer takes for its data: each rollout is collected when its turn has come."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.models.chat import encode_pair, pad_rows
from pipeline.models.generation import Responses, permutation
from pipeline.ppo import functional
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.config import PPOConfig

Plan = list[list[list[int]]]  # of one PPO epoch: the rows of each micro-batch of each minibatch


@dataclass
class Rollout:
    """A scored rollout of B answers; all but `answers` and `scores` (B,) are (B, T)."""

    answers: Responses
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


def split_minibatches(answers: Responses, args: PPOConfig, rollout: int, ppo_epoch: int) -> Plan:
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
def compute_experience(actor: ActorCritic, answers: Responses, scores: Tensor, args: PPOConfig, rollout: int, autocast: Any) -> Rollout:
    """Log-probabilities, values, advantages and returns, computed in the very micro-batches of the first PPO epoch: the ratio of its
    first minibatch is then 1 to the bit."""
    actor.train()
    shape, device = answers.response_ids.shape, answers.response_ids.device
    logprobs, ref_logprobs, values, entropy = (torch.zeros(shape, device=device) for _ in range(4))
    for rows in (rows for minibatch in split_minibatches(answers, args, rollout, 0) for rows in minibatch):
        inputs = _trim(answers, rows)
        width = inputs["response_ids"].shape[1]
        with autocast():
            out = actor(**inputs, temperature=args.temperature)
            ref_logprobs[rows, :width] = actor.reference_logprobs(**inputs, temperature=args.temperature)
        logprobs[rows, :width], values[rows, :width], entropy[rows, :width] = out.logprobs, out.values, out.entropy
    mask = answers.response_mask.bool()
    kl = functional.kl_estimate(logprobs, ref_logprobs, args.kl_estimator)
    rewards = functional.shape_rewards(scores, kl, mask, float(actor.kl_coef))
    advantages, returns = functional.gae(rewards, values, mask, args.gamma, args.lam)
    return Rollout(answers, scores, logprobs, ref_logprobs, values, entropy, functional.whiten(advantages, mask), returns)


def iterate_minibatches(experience: Rollout, args: PPOConfig, rollout: int) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of each minibatch, in the order they are trained on."""
    for ppo_epoch in range(args.num_ppo_epochs):
        for minibatch in split_minibatches(experience.answers, args, rollout, ppo_epoch):
            yield [_micro_batch(experience, rows) for rows in minibatch]


def _micro_batch(experience: Rollout, rows: list[int]) -> dict[str, Any]:
    inputs: dict[str, Any] = _trim(experience.answers, rows)
    width = inputs["response_ids"].shape[1]
    for name in ("logprobs", "values", "advantages", "returns"):
        inputs[name] = getattr(experience, name)[rows, :width]
    return inputs | {"rows": rows}


def _trim(answers: Responses, rows: list[int]) -> dict[str, Tensor]:
    """The four tensors of some rows, without the padding that none of them needs."""
    queries = int(answers.query_mask[rows].sum(1).max())
    responses = int(answers.response_mask[rows].sum(1).max())
    return {
        "query_ids": answers.query_ids[rows][:, -queries:], "query_mask": answers.query_mask[rows][:, -queries:],
        "response_ids": answers.response_ids[rows][:, :responses], "response_mask": answers.response_mask[rows][:, :responses],
    }  # fmt: skip


class RolloutDataLoader:
    """The train dataloader: a sized iterable that Accelerate never wraps, so that the live model rolls out when its turn has come."""

    def __init__(self, trainer: Any):  # a `PPOTrainer`
        self.trainer, self.rollout = trainer, 0

    def __len__(self) -> int:
        return self.trainer.args.steps_per_rollout * self.trainer.args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        self.rollout = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer, args = self.trainer, self.trainer.args
        trainer.clock.setdefault("since", time.perf_counter())
        experience = trainer.collect(self.rollout)
        for number, micro_batches in enumerate(iterate_minibatches(experience, args, self.rollout)):
            rows = [row for inputs in micro_batches for row in inputs.pop("rows")]
            trainer.minibatch = (experience, rows)
            common = {"rollout": self.rollout, "num_tokens": trainer.accelerator.reduce(experience.mask[rows].sum(), "sum")}
            shown = self._demonstrations(number, len(rows))
            for inputs, demonstrations in zip(micro_batches, shown["demonstrations"], strict=True):
                last = inputs is micro_batches[-1]
                yield inputs | common | shown | {"demonstrations": demonstrations, "first": number == 0, "last": last}

    def _demonstrations(self, number: int, count: int) -> dict[str, Any]:
        """As many demonstrations for each micro-batch of a minibatch as it has answers, and the tokens of all of them on all ranks."""
        trainer, args, data = self.trainer, self.trainer.args, self.trainer.demonstrations
        parts = args.gradient_accumulation_steps
        if not args.ptx_coef or data is None:
            return {"demonstrations": [None] * parts}
        start = ((self.rollout * args.steps_per_rollout + number) * args.world_size + args.process_index) * count
        rows = [data[trainer.pick(len(data), "demonstrations", row)] for row in range(start, start + count)]
        longest = trainer.max_prompt_tokens + args.response_tokens
        pairs = [encode_pair(trainer.processing_class, row["prompt"], row["completion"], longest) for row in rows]
        encoded = [(prompt or [trainer.processing_class.eos_token_id], completion) for prompt, completion in pairs]
        pad, tensors = trainer.processing_class.pad_token_id, []
        for micro in range(0, count, count // parts):
            prompts, completions = zip(*encoded[micro : micro + count // parts], strict=True)
            query, response = pad_rows(prompts, pad, side="left"), pad_rows(completions, pad)
            tensors.append({"query_ids": query[0], "query_mask": query[1], "response_ids": response[0], "response_mask": response[1]})
        tokens = torch.tensor(sum(len(completion) for _, completion in encoded), device=args.device)
        return {"demonstrations": tensors, "demonstration_tokens": trainer.accelerator.reduce(tokens, "sum")}
