"""Sampling answers and reading their log-probabilities.

Everything random derives from (seed, rollout, global row), so that no generator's state is ever saved and neither batching nor the
number of processes changes a sample.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from pipeline import encoding, models


@dataclass
class Answers:
    """Queries padded on the left (B, P), responses on the right (B, T); `ended` where the EOS came in time (it is a real token)."""

    query_ids: Tensor
    query_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    texts: list[str]
    ended: list[bool]

    def token_lists(self) -> list[list[int]]:
        """The response ids of each row, without padding, with the EOS where there is one."""
        return [ids[mask.bool()].tolist() for ids, mask in zip(self.response_ids, self.response_mask, strict=True)]


class InverseCDF(LogitsProcessor):
    """Leaves one token possible per row: the one at which the cumulative probability passes that row's uniform number of this step.

    As the last processor under greedy decoding it makes `generate` sample with our noise, (B, T).
    """

    def __init__(self, noise: Tensor, temperature: float):
        self.noise, self.temperature, self.step = noise, temperature, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulative = (scores.float() / self.temperature).softmax(-1).cumsum(-1)
        threshold = self.noise[:, self.step : self.step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).clamp_max(scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)  # type: ignore[return-value]


def noise(seed: int, rollout: int, rows: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers (len(rows), steps), each row's own."""
    return torch.stack([torch.rand(steps, generator=generator(seed, "noise", rollout, row)) for row in rows])


def permutation(n: int, *key: Any) -> list[int]:
    """A permutation of range(n) that depends on `key` alone."""
    return torch.randperm(n, generator=generator(*key)).tolist()


def generator(*key: Any) -> torch.Generator:
    """A CPU generator seeded by the hash of `key`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def load(source: str, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A policy ready to sample from, on the GPU where there is one, and its tokenizer."""
    tokenizer = models.load_tokenizer(source, **options)
    model: Any = models.load_policy(source, tokenizer, **options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def sample(
    policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[encoding.Text], rows: Sequence[int], *,
    seed: int, temperature: float, response_tokens: int, max_prompt_tokens: int, batch_size: int,
) -> Iterator[Answers]:  # fmt: skip
    """One answer to each prompt, in batches; its noise is that of its number in `rows`. A prompt too long loses its beginning."""
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        ids = [encoding.prompt_ids(tokenizer, prompt)[-max_prompt_tokens:] for prompt in prompts[batch]]
        yield generate(policy, tokenizer, ids, noise(seed, 0, rows[batch], response_tokens), temperature)


@torch.inference_mode()
def generate(policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], noise: Tensor, temperature: float) -> Answers:
    """One answer to each prompt (token ids), at most noise.shape[1] tokens with its EOS. The policy's mode is put back."""
    training = policy.training
    policy.eval()
    device = policy.device
    ids, mask = (x.to(device) for x in encoding.pad(prompts, tokenizer.pad_token_id, side="left"))
    config = GenerationConfig(
        max_new_tokens=noise.shape[1],
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    sampler = LogitsProcessorList([InverseCDF(noise.to(device), temperature)])
    with _generation_config(policy, config):
        output = policy.generate(input_ids=ids, attention_mask=mask, logits_processor=sampler)
    policy.train(training)
    return _answers(tokenizer, ids, mask, output[:, ids.shape[1] :])


@contextmanager
def _generation_config(policy: Any, config: GenerationConfig) -> Iterator[None]:
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


def read(model: Any, query_ids: Tensor, query_mask: Tensor, response_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(logits (B, T, V) in fp32, last hidden states (B, T, H)) of the positions that choose the response tokens.

    Queries (B, P) are padded on the left, responses (B, T) on the right; masks are 1 on real tokens.
    """
    mask = torch.cat([query_mask, response_mask], 1)
    out = model(
        input_ids=torch.cat([query_ids, response_ids], 1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        logits_to_keep=response_ids.shape[1] + 1,
        output_hidden_states=True,
        use_cache=False,
    )
    first = query_ids.shape[1] - 1
    return out.logits[:, :-1].float(), out.hidden_states[-1][:, first:-1]


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of `ids` (B, T) under `logits` (B, T, V)."""
    return -torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def _answers(tokenizer: PreTrainedTokenizerBase, query_ids: Tensor, query_mask: Tensor, response_ids: Tensor) -> Answers:
    is_eos = response_ids == tokenizer.eos_token_id
    real = (is_eos.cumsum(1) - is_eos.long()) == 0  # up to and with the first EOS
    response_ids = response_ids.masked_fill(~real, tokenizer.pad_token_id)
    texts = [
        str(tokenizer.decode(ids[keep & ~eos], skip_special_tokens=True)) for ids, keep, eos in zip(response_ids, real, is_eos, strict=True)
    ]
    return Answers(query_ids, query_mask, response_ids, real.long(), texts, (is_eos & real).any(1).tolist())
