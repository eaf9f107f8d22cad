"""Decode responses at the cost of their real tokens.

`policy.generate` computes every row of a batch until the last has ended. Here it stops when a quarter of the
rows have ended. They leave the batch and its cache, waiting prompts take their places, and it goes on. Fewer
than a quarter of the rows of a step have then ended before it, so a batch computes less than 4/3 of its real
tokens. When to stop depends on the tokens alone, so that the same call has the same bits.

Continuous batching in transformers (`generate_batch`, 5.23) has no place for a caller's logits processors: a
row would lose its own random numbers. On a CPU it also took longer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pipeline.models.caches import drop_columns, is_plain, join_rows, select_rows
from pipeline.models.chat import pad_rows
from pipeline.models.patches import without_router_logits

# Builds the processors of the logits of rows, which are numbers of prompts, that have so many tokens already.
MakeProcessors = Callable[[list[int], list[int]], LogitsProcessorList]


class Sampling(NamedTuple):
    """How a model can be sampled.

    Whether prompts of different lengths may form a batch, padded on the left; whether with a cache; and
    whether rows may leave a batch that goes on.
    """

    padding: bool = True
    cache: bool = True
    compact: bool = True


class Limits(NamedTuple):
    """When a response ends: with one of the token ids `ends`, or with its last of `tokens`."""

    tokens: int
    ends: list[int]


@dataclass
class _Batch:
    """Rows that are decoded together.

    `rows` are their numbers. `ids` and `mask` (rows, columns) have their prompts and tokens, padded on the
    left. `cache` has all columns but the last; it is None before the first step, or if none is used.
    """

    rows: list[int]
    ids: Tensor
    mask: Tensor
    cache: Any = None


class _EnoughEnded(StoppingCriteria):
    """End rows at an end token or when no token is `left` (rows,), and all rows when `enough` have ended."""

    def __init__(self, ends: Tensor, left: Tensor, enough: int):
        self.ends, self.left, self.enough = ends, left, enough
        self.ended, self.step = torch.zeros_like(left, dtype=torch.bool), 0

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        """Return which rows (rows,) go no further."""
        self.step += 1
        self.ended |= torch.isin(input_ids[:, -1], self.ends) | (self.left <= self.step)
        return self.ended | (self.ended.sum() >= self.enough)  # type: ignore[return-value]


def decode(
    policy: Any,
    prompts: Sequence[list[int]],
    processors: MakeProcessors,
    limits: Limits,
    *,
    pad_token_id: int,
    batch_size: int,
    way: Sampling,
) -> list[list[int]]:
    """Return the greedy response to each prompt (token ids) under `processors`, with the token that ends it.

    At most `batch_size` rows are decoded at once, of prompts of similar length. Waiting rows join as soon as
    others have left, if the cache of the model allows it.
    """
    config = GenerationConfig(
        max_new_tokens=limits.tokens,
        do_sample=False,
        use_cache=way.cache,
        pad_token_id=pad_token_id,
        eos_token_id=limits.ends,
        return_dict_in_generate=True,
    )
    decoder = _Decoder(policy, prompts, processors, limits, pad_token_id)
    with _only_generation_config(policy, config), without_router_logits(policy):
        for waiting in _groups(list(map(len, prompts)), way.padding):
            batch: _Batch | None = None
            while waiting or batch:
                if batch is None:
                    batch, waiting = decoder.start(waiting[:batch_size]), waiting[batch_size:]
                elif waiting and way.padding and _can_move(batch):
                    free = batch_size - len(batch.rows)
                    joining, waiting = decoder.start(waiting[:free]), waiting[free:]
                    batch = _join(batch, decoder.advance(joining, enough=0), pad_token_id)
                size = len(batch.rows)
                batch = decoder.advance(batch, enough=math.ceil(size / 4) if way.compact else size)
    return decoder.responses


class _Decoder:
    """Decode batches of rows, and collect the tokens of each in `responses`."""

    def __init__(
        self,
        policy: Any,
        prompts: Sequence[list[int]],
        processors: MakeProcessors,
        limits: Limits,
        pad_token_id: int,
    ):
        self.policy, self.prompts, self.processors = policy, prompts, processors
        self.limits, self.pad_token_id = limits, pad_token_id
        self.responses: list[list[int]] = [[] for _ in prompts]

    def start(self, rows: list[int]) -> _Batch:
        """Return a batch of the prompts of these rows."""
        padded = pad_rows([self.prompts[row] for row in rows], self.pad_token_id, side="left")
        return _Batch(rows, *(tensor.to(self.policy.device) for tensor in padded))

    def advance(self, batch: _Batch, enough: int) -> _Batch | None:
        """Decode until `enough` rows have ended, and at least one token.

        Returns the batch of the rows that have not ended, or None if all have.
        """
        steps = [len(self.responses[row]) for row in batch.rows]
        left = torch.tensor([self.limits.tokens - step for step in steps], device=batch.ids.device)
        ends = torch.tensor(self.limits.ends, device=batch.ids.device)
        output = self.policy.generate(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            logits_processor=self.processors(batch.rows, steps),
            stopping_criteria=StoppingCriteriaList([_EnoughEnded(ends, left, enough)]),
            synced_gpus=False,  # processes have full weights, and rows that end at different steps
            **({"past_key_values": batch.cache} if batch.cache is not None else {}),
        )
        for row, ids in zip(batch.rows, output.sequences[:, batch.ids.shape[1] :].tolist(), strict=True):
            self._append(row, ids)

        kept = [i for i, row in enumerate(batch.rows) if not self._has_ended(row)]
        return _select(batch, kept, output.sequences, output.get("past_key_values")) if kept else None

    def _append(self, row: int, ids: list[int]) -> None:
        """Append token ids to a response up to its end; padding may follow."""
        for token in ids:
            if not self._has_ended(row):
                self.responses[row].append(token)

    def _has_ended(self, row: int) -> bool:
        ids = self.responses[row]
        return len(ids) == self.limits.tokens or any(end in self.limits.ends for end in ids[-1:])


def _select(batch: _Batch, kept: list[int], ids: Tensor, cache: Any) -> _Batch:
    """Return the batch of these rows with its new `ids` and `cache`, without columns that are all padding."""
    indices = torch.tensor(kept, device=ids.device)
    if cache is not None:
        select_rows(cache, indices)
    mask = batch.mask.new_ones(ids.shape)
    mask[:, : batch.mask.shape[1]] = batch.mask
    selected = _Batch([batch.rows[i] for i in kept], ids[indices], mask[indices], cache)
    if _can_move(selected):
        _trim(selected)
    return selected


def _can_move(batch: _Batch) -> bool:
    """Return whether rows of the batch can get other columns."""
    return batch.cache is None or is_plain(batch.cache)


def _trim(batch: _Batch) -> None:
    padding = int(batch.mask.any(0).int().argmax())  # columns before the first real one
    batch.ids, batch.mask = batch.ids[:, padding:], batch.mask[:, padding:]
    if padding and batch.cache is not None:
        drop_columns(batch.cache, padding)


def _join(batch: _Batch, other: _Batch | None, pad_token_id: int) -> _Batch:
    """Return the batch of the rows of both, whose last columns are aligned."""
    if other is None:
        return batch
    if batch.cache is not None:
        join_rows(batch.cache, other.cache)
    width = max(batch.ids.shape[1], other.ids.shape[1])
    ids, mask = (
        torch.cat([torch.nn.functional.pad(rows, (width - rows.shape[1], 0), value=value) for rows in pair])
        for pair, value in (((batch.ids, other.ids), pad_token_id), ((batch.mask, other.mask), 0))
    )
    return _Batch(batch.rows + other.rows, ids, mask, batch.cache)


def _groups(lengths: Sequence[int], padding: bool) -> list[list[int]]:
    """Return indices by length in groups that may share a batch; without `padding` these have one length."""
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    if padding:
        return [by_length]
    return [list(group) for _, group in groupby(by_length, key=lengths.__getitem__)]


@contextmanager
def _only_generation_config(policy: Any, config: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of the policy and its base model, and restore it at the end.

    `generate` fills the unset fields of a config from the model's own, for example a published repetition
    penalty. The samples would then not follow the distribution of the log-probabilities.
    """
    models = [policy, *([policy.get_base_model()] if hasattr(policy, "get_base_model") else [])]
    originals = [model.generation_config for model in models]
    try:
        for model in models:
            model.generation_config = config
        yield
    finally:
        for model, original in zip(models, originals, strict=True):
            model.generation_config = original
