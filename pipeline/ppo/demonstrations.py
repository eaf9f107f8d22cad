"""Demonstrations for the pretraining loss, `ptx_coef` (PPO-ptx, Ouyang et al. 2022).

Each micro-batch has as many demonstrations as responses.
"""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.models.chat import encode_pair, pad_rows
from pipeline.models.generation import permuted_index
from pipeline.ppo.config import PPOConfig


def demonstration_batches(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    rollout: int,
    step: int,
    count: int,
    max_tokens: int,
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Return the demonstrations of one minibatch, and the number of their completion tokens on this process.

    There is one dict of padded tensors per micro-batch. `step` is the number of the minibatch in its rollout,
    `count` its rows on this process; a pair over `max_tokens` is truncated.
    """
    start = ((rollout * args.steps_per_rollout + step) * args.world_size + args.process_index) * count
    rows = range(start, start + count)
    records = [data[permuted_index(len(data), args.seed, "demonstrations", row)] for row in rows]
    pairs = [encode_pair(tokenizer, record["prompt"], record["completion"], max_tokens) for record in records]
    # A template may render an empty prompt to nothing; its completion then follows EOS.
    encoded = [(prompt or [tokenizer.eos_token_id], turn) for prompt, turn, _ in pairs]

    size, batches = count // args.gradient_accumulation_steps, []
    for first in range(0, count, size):
        prompts, completions = zip(*encoded[first : first + size], strict=True)
        query = pad_rows(prompts, tokenizer.pad_token_id, side="left")
        response = pad_rows(completions, tokenizer.pad_token_id)
        names = ("query_ids", "query_mask", "response_ids", "response_mask")
        batches.append(dict(zip(names, (*query, *response), strict=True)))

    tokens = sum(len(completion) for _, completion in encoded)
    return batches, torch.tensor(tokens, device=args.device)
