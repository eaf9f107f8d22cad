"""Sample responses from a policy.

All random numbers derive from (seed, rollout, global row). No generator state has to be saved, and neither
batching nor the number of processes changes a sample.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.data.schema import Text
from pipeline.data.texts import check_count, check_texts
from pipeline.errors import UserError
from pipeline.models.chat import pad_rows
from pipeline.models.decoding import Limits, decode
from pipeline.models.ends import end_token_ids
from pipeline.models.probes import describe_sampling, require_positions
from pipeline.models.prompts import prepare_prompts


@dataclass
class Responses:
    """Prompts and sampled responses of a batch.

    Query tensors are (B, P), padded on the left; response tensors are (B, T), padded on the right.
    `ended` is True if the response ends with an end token (`end_token_ids`), which counts as a real token.
    `texts` do not contain that token. `sampler_logprobs` (B, T) are the log-probabilities of the response ids
    under the distribution that an engine sampled them from, after temperature, top-k, top-p and minimum
    length; zero off the mask. None for the built-in sampler.
    """

    query_ids: Tensor
    query_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    texts: list[str]
    ended: list[bool]
    sampler_logprobs: Tensor | None = None

    def token_lists(self) -> list[list[int]]:
        """Return the response ids of each row without padding, with the stop token if there is one."""
        return [
            ids[mask.bool()].tolist() for ids, mask in zip(self.response_ids, self.response_mask, strict=True)
        ]


class MinimumLength(LogitsProcessor):
    """Forbid the token ids `ends` while a row needs more tokens: at the first step, `needed` (B,)."""

    def __init__(self, ends: Sequence[int], needed: Tensor):
        self.ends, self.needed = torch.tensor(ends, device=needed.device), needed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return `scores` (B, V) with -inf at the ends of the rows that are too short."""
        is_end = torch.isin(torch.arange(scores.shape[-1], device=scores.device), self.ends)
        forbidden = is_end & (self.needed > 0)[:, None]
        self.needed = self.needed - 1
        return scores.masked_fill(forbidden, -torch.inf)  # type: ignore[return-value]


class InverseCDF(LogitsProcessor):
    """Allow one token per row: the one at which the cumulative probability exceeds the row's uniform number.

    As the last processor under greedy decoding, it makes `generate` sample with the given uniforms (B, T).
    Each step uses one column.
    """

    def __init__(self, uniforms: Tensor):
        self.uniforms, self.step = uniforms, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return `scores` (B, V) with -inf everywhere but at the sampled token."""
        cumulative = scores.float().softmax(-1).cumsum(-1)
        threshold = self.uniforms[:, self.step : self.step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).clamp_max(scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)  # type: ignore[return-value]


def uniforms(seed: int, rollout: int, rows: Sequence[int], steps: int) -> Tensor:
    """Return uniform numbers (len(rows), steps); those of a row depend on no other row."""
    return torch.stack(
        [torch.rand(steps, generator=seeded_generator(seed, "noise", rollout, row)) for row in rows]
    )


@lru_cache(maxsize=8)
def permutation(n: int, *key: Any) -> list[int]:
    """Return a permutation of range(n) that depends on `key` alone."""
    return torch.randperm(n, generator=seeded_generator(*key)).tolist()


def permuted_index(size: int, seed: int, name: str, row: int) -> int:
    """Return which of `size` items belongs to a global row; each pass over all has its own permutation."""
    turn, position = divmod(row, size)
    return permutation(size, seed, name, turn)[position]


def seeded_generator(*key: Any) -> torch.Generator:
    """Return a CPU generator seeded by the hash of `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def sample_responses(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    rows: Sequence[int],
    *,
    seed: int,
    temperature: float,
    response_tokens: int,
    max_prompt_tokens: int,
    batch_size: int,
    side: str = "left",
    ends: Sequence[int] = (),
    sampler: Callable[..., Responses] | None = None,
) -> Iterator[Responses]:
    """Sample one response to each prompt, in batches.

    The random numbers of a prompt depend on `seed` and its global row in `rows`. A prompt longer than
    `max_prompt_tokens` is truncated on `side`. `ends` are more ids that end a response. `sampler` has the
    signature of `generate`, which it replaces. Raises `UserError` if an argument is of another kind.
    """
    check_texts("prompts", prompts)
    check_count("batch_size", batch_size)
    check_count("response_tokens", response_tokens)
    check_count("max_prompt_tokens", max_prompt_tokens)
    if len(rows) != len(prompts):
        raise UserError(f"rows: {len(rows)} numbers for {len(prompts)} prompts; expected equal numbers")
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        ids = prepare_prompts(tokenizer, prompts[batch], max_prompt_tokens, side)
        numbers = uniforms(seed, 0, rows[batch], response_tokens)
        yield (sampler or generate)(policy, tokenizer, ids, numbers, temperature, ends=ends)


@torch.inference_mode()
def generate(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    uniforms: Tensor,
    temperature: float = 1.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_response_tokens: int = 0,
    stop_token: str | None = None,
    batch_size: int = 64,
    ends: Sequence[int] = (),
) -> Responses:
    """Sample one response to each prompt (token ids) with uniforms (B, T).

    A response has at most T tokens, with the one that ends it: one of `end_token_ids` or `ends`. At most
    `batch_size` rows are computed at once, of prompts of similar length; a row that has ended leaves, and a
    waiting one takes its place (`pipeline.models.decoding`). The policy's mode is restored.

    If padding, a cache or rows that leave it change the policy's logits, they are not used
    (`pipeline.models.probes`). Raises `UserError` if there are no prompts, they are no token ids, the
    uniforms have another shape, the policy is no decoder, or a prompt and T tokens are more than its
    positions.
    """
    _check_ids(prompts, uniforms)
    check_count("batch_size", batch_size)
    longest = max(map(len, prompts)) + uniforms.shape[1]
    require_positions(policy, longest)
    way = describe_sampling(policy, longest)
    ends = list(dict.fromkeys([*end_token_ids(policy, tokenizer, stop_token), *ends]))
    warpers = [*_mask_unknown_ids(policy, tokenizer), *_warpers(temperature, top_k, top_p)]

    def processors(rows: list[int], steps: list[int]) -> LogitsProcessorList:
        """Return the processors of rows that have so many tokens: each goes on with its own numbers."""
        sampled = torch.tensor(steps)
        columns = (sampled[:, None] + torch.arange(uniforms.shape[1])).clamp_max(uniforms.shape[1] - 1)
        numbers = uniforms[rows].gather(1, columns.to(uniforms.device)).to(policy.device)
        needed = (min_response_tokens - sampled).to(policy.device)
        minimum = [MinimumLength(ends, needed)] if min_response_tokens else []
        return LogitsProcessorList([*minimum, *warpers, InverseCDF(numbers)])

    training = policy.training
    policy.eval()
    limits, pad = Limits(uniforms.shape[1], ends), tokenizer.pad_token_id
    responses = decode(policy, prompts, processors, limits, pad_token_id=pad, batch_size=batch_size, way=way)
    policy.train(training)
    return to_responses(tokenizer, prompts, responses, ends, policy.device)


def unknown_ids(policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids above the tokenizer's highest one, to which the rows of some models are padded."""
    rows = int(policy.config.get_text_config().vocab_size)
    if rows <= len(tokenizer):
        return []
    return list(range(max(tokenizer.get_vocab().values()) + 1, rows))


def _mask_unknown_ids(policy: Any, tokenizer: PreTrainedTokenizerBase) -> list[LogitsProcessor]:
    ids = unknown_ids(policy, tokenizer)
    return [SuppressTokensLogitsProcessor(ids, device=policy.device)] if ids else []


def _check_ids(prompts: Any, uniforms: Any) -> None:
    valid = isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts)
    if not valid or not all(isinstance(ids, list | tuple) and ids for ids in prompts):
        raise UserError("prompts: expected a list of prompts, each a list of token ids, none of them empty")
    if not isinstance(uniforms, Tensor) or uniforms.ndim != 2 or len(uniforms) != len(prompts):
        raise UserError(
            f"uniforms: expected a tensor of ({len(prompts)}, response tokens) for {len(prompts)} prompts; "
            "see pipeline.models.generation.uniforms"
        )


def _warpers(temperature: float, top_k: int, top_p: float) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = []
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def to_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    ends: Sequence[int],
    device: torch.device,
) -> Responses:
    """Build `Responses` on `device`."""
    ended = [ids[-1] in ends for ids in responses]
    texts = [
        str(tokenizer.decode(ids[: len(ids) - end], skip_special_tokens=True))
        for ids, end in zip(responses, ended, strict=True)
    ]

    query = pad_rows(prompts, tokenizer.pad_token_id, side="left")
    response = pad_rows(responses, tokenizer.pad_token_id)
    query_ids, query_mask, response_ids, response_mask = (tensor.to(device) for tensor in (*query, *response))
    return Responses(query_ids, query_mask, response_ids, response_mask, texts, ended)
