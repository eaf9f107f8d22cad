"""The stream of micro-batches that the Trainer takes for its data: each rollout is collected when its turn has come."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from pipeline import encoding
from pipeline.ppo.experience import minibatches


class RolloutStream:
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
        for number, micro_batches in enumerate(minibatches(experience, args, self.rollout)):
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
        pairs = [encoding.encode(trainer.processing_class, row["prompt"], row["completion"], longest) for row in rows]
        encoded = [(prompt or [trainer.processing_class.eos_token_id], completion) for prompt, completion in pairs]
        pad, tensors = trainer.processing_class.pad_token_id, []
        for micro in range(0, count, count // parts):
            prompts, completions = zip(*encoded[micro : micro + count // parts], strict=True)
            query, response = encoding.pad(prompts, pad, side="left"), encoding.pad(completions, pad)
            tensors.append({"query_ids": query[0], "query_mask": query[1], "response_ids": response[0], "response_mask": response[1]})
        tokens = torch.tensor(sum(len(completion) for _, completion in encoded), device=args.device)
        return {"demonstrations": tensors, "demonstration_tokens": trainer.accelerator.reduce(tokens, "sum")}
