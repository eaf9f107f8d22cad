"""Sampling answers.

Everything random derives from (seed, rollout, global row), so that no generator's state is ever saved and neither batching nor the
number of processes changes a sample.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.data.schema import Text
from pipeline.errors import UserError
from pipeline.models.chat import pad_rows, prompt_ids


@dataclass
class Responses:
    """Queries padded on the left (B, P), responses on the right (B, T); `ended` where the EOS came in time (it is a real token)."""

    query_ids: Tensor
    query_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    texts: list[str]
    ended: list[bool]

    def token_lists(self) -> list[list[int]]:
        """The response ids of each row, without padding, with the EOS where there is one."""
        return [
            ids[mask.bool()].tolist() for ids, mask in zip(self.response_ids, self.response_mask, strict=True)
        ]


class InverseCDF(LogitsProcessor):
    """Leaves one token possible per row: the one at which the cumulative probability passes that row's uniform number of this step.

    As the last processor under greedy decoding it makes `generate` sample with our noise, (B, T).
    """

    def __init__(self, noise: Tensor):
        self.noise, self.step = noise, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulative = scores.float().softmax(-1).cumsum(-1)
        threshold = self.noise[:, self.step : self.step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).clamp_max(scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)  # type: ignore[return-value]


def uniforms(seed: int, rollout: int, rows: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers (len(rows), steps), each row's own."""
    return torch.stack(
        [torch.rand(steps, generator=seeded_generator(seed, "noise", rollout, row)) for row in rows]
    )


@lru_cache(maxsize=8)
def permutation(n: int, *key: Any) -> list[int]:
    """A permutation of range(n) that depends on `key` alone."""
    return torch.randperm(n, generator=seeded_generator(*key)).tolist()


def permuted_index(size: int, seed: int, name: str, row: int) -> int:
    """Return which of `size` things belongs to a global row: each pass over them takes a new permutation."""
    turn, place = divmod(row, size)
    return permutation(size, seed, name, turn)[place]


def seeded_generator(*key: Any) -> torch.Generator:
    """A CPU generator seeded by the hash of `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def prepare_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], max_tokens: int
) -> list[list[int]]:
    """Return the token ids of each prompt; a longer one is truncated on the left.

    A template may render an empty prompt to nothing: the response then follows EOS, as it does in training.
    """
    return [prompt_ids(tokenizer, prompt)[-max_tokens:] or [tokenizer.eos_token_id] for prompt in prompts]


def sample_responses(
    policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], rows: Sequence[int], *,
    seed: int, temperature: float, response_tokens: int, max_prompt_tokens: int, batch_size: int,
) -> Iterator[Responses]:  # fmt: skip
    """One answer to each prompt, in batches; its noise is that of its number in `rows`. A prompt too long loses its beginning."""
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        ids = prepare_prompts(tokenizer, prompts[batch], max_prompt_tokens)
        yield generate(policy, tokenizer, ids, uniforms(seed, 0, rows[batch], response_tokens), temperature)


@torch.inference_mode()
def generate(
    policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], noise: Tensor, temperature: float = 1.0, *,
    top_k: int = 0, top_p: float = 1.0, min_response_tokens: int = 0, stop_token: str | None = None, batch_size: int = 64,
) -> Responses:  # fmt: skip
    """One answer to each prompt (token ids), at most noise.shape[1] tokens with the EOS or `stop_token` that ends it.

    `batch_size` prompts of like length go together, until the last of them has ended. The policy's mode is put back.
    """
    ends = [tokenizer.eos_token_id, *([stop_token_id(tokenizer, stop_token)] if stop_token else [])]
    shaped = [
        *([TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
    ]
    given = {
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": ends,
    }
    training = policy.training
    policy.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: dict[int, list[int]] = {}
    with _only_generation_config(policy, GenerationConfig(max_new_tokens=noise.shape[1], **given)):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = (
                x.to(policy.device)
                for x in pad_rows([prompts[i] for i in rows], tokenizer.pad_token_id, side="left")
            )
            unended = MinNewTokensLengthLogitsProcessor(
                ids.shape[1], min_response_tokens, ends, policy.device
            )
            sampler = LogitsProcessorList([unended, *shaped, InverseCDF(noise[rows].to(policy.device))])
            output = policy.generate(input_ids=ids, attention_mask=mask, logits_processor=sampler)
            responses |= dict(zip(rows, map(list, output[:, ids.shape[1] :].tolist()), strict=True))
    policy.train(training)
    return _as_responses(tokenizer, prompts, [responses[i] for i in range(len(prompts))], ends, policy.device)


def stop_token_id(tokenizer: PreTrainedTokenizerBase, stop_token: str) -> int:
    """The id of a token that ends an answer. Raises `UserError` where the tokenizer makes several of it, or none."""
    known = tokenizer.get_vocab()
    # Some tokenizers write the beginning of a text otherwise than what follows.
    ids = (
        [known[stop_token]]
        if stop_token in known
        else tokenizer(stop_token, add_special_tokens=False)["input_ids"]
    )
    if len(ids) != 1:
        raise UserError(f"stop_token={stop_token!r} is {len(ids)} tokens of this tokenizer; expected one")
    return int(ids[0])


@contextmanager
def _only_generation_config(policy: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a given config leaves open from the model's own (a published repetition penalty, say), which would bend the
    samples away from the log-probabilities: so the model's own is put aside."""
    models = [policy, *([policy.get_base_model()] if hasattr(policy, "get_base_model") else [])]
    own = [model.generation_config for model in models]
    try:
        for model in models:
            model.generation_config = config
        yield
    finally:
        for model, config in zip(models, own, strict=True):
            model.generation_config = config


def _as_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    ends: Sequence[int],
    device: torch.device,
) -> Responses:
    """What comes after the first token that ends an answer is dropped."""
    lengths = [next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids)) for ids in responses]
    kept = [ids[:length] for ids, length in zip(responses, lengths, strict=True)]
    ended = [ids[-1] in ends for ids in kept]
    texts = [
        str(tokenizer.decode(ids[: len(ids) - end], skip_special_tokens=True))
        for ids, end in zip(kept, ended, strict=True)
    ]
    query = pad_rows(prompts, tokenizer.pad_token_id, side="left")
    response = pad_rows(kept, tokenizer.pad_token_id)
    query_ids, query_mask, response_ids, response_mask = (x.to(device) for x in (*query, *response))
    return Responses(query_ids, query_mask, response_ids, response_mask, texts, ended)
