"""Log-probabilities of tokens under the truncated distribution that a sampler draws from.

The built-in sampler and engines process logits alike: they forbid ids, then come the temperature, top-k and
top-p. `truncated_logprobs` computes the probability that a token has after that.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

# Elements of an (N, V) tensor processed at a time. Top-p sorts them, and keeps their order beside them.
CHUNK = 2**22


class Truncation(NamedTuple):
    """Which tokens a sampler cannot draw; the default is that it can draw all.

    `ends` cannot be drawn in the first `min_response_tokens` of a response, and `forbidden` nowhere.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_response_tokens: int = 0
    ends: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether every token can be drawn."""
        return not (self.top_k or self.top_p < 1 or self.min_response_tokens or self.forbidden)


@torch.no_grad()
def truncated_logprobs(
    logits: Tensor, ids: Tensor, steps: Tensor, temperature: float, truncation: Truncation
) -> Tensor:
    """Return the (N,) log-probabilities in fp32, or fp64, of `ids` (N,), -inf for ids that cannot be drawn.

    `logits` are (N, V); `steps` (N,) are the numbers of the tokens in their responses, from 0. Chunks of rows
    are processed one by one, so that the memory needed does not grow with N.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs = torch.empty(len(logits), dtype=dtype, device=logits.device)
    size = max(1, CHUNK // max(1, logits.shape[-1]))
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        scores = _truncate(logits[rows].to(dtype, copy=True), steps[rows], temperature, truncation)
        logprobs[rows] = scores.log_softmax(-1).gather(1, ids[rows, None]).squeeze(1)
    return logprobs


def _truncate(scores: Tensor, steps: Tensor, temperature: float, truncation: Truncation) -> Tensor:
    """Return `scores` (n, V), which it overwrites, at the temperature, with -inf where nothing is drawn."""
    if truncation.forbidden:
        scores[:, list(truncation.forbidden)] = -torch.inf
    if truncation.min_response_tokens and truncation.ends:
        is_early = (steps < truncation.min_response_tokens)[:, None]
        ends = list(truncation.ends)
        scores[:, ends] = scores[:, ends].masked_fill(is_early, -torch.inf)
    if temperature != 1:
        scores /= temperature
    no_ids = torch.empty(0, dtype=torch.long)  # that the processors do not read
    if truncation.top_k:
        scores = TopKLogitsWarper(truncation.top_k)(no_ids, scores)
    if truncation.top_p < 1:
        scores = TopPLogitsWarper(truncation.top_p)(no_ids, scores)
    return scores
