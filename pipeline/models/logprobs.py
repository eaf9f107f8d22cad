"""Reading answers: what a policy makes of each of their tokens.

Rows go in without a gap between query and response, and the output layer sees only the states that choose a response token: a
vocabulary's worth of numbers for each token is what a language model costs most.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

CHUNK = 2**22  # numbers that are worked on at a time where a vocabulary's worth belongs to each token

CPU_ROWS = 16  # that a CPU reads at a time: it gains nothing from more, and rows that lie in order of length need less padding


class TokenStats(NamedTuple):
    """Log-probabilities and entropies in nats (B, T), zero off the mask; and the last hidden states (N, H) of the N real tokens, each the
    state in which the token was chosen, row by row."""

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor


def response_logprobs(
    model: Any,
    query_ids: Tensor,
    query_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
) -> TokenStats:
    """Queries (B, P) are padded on the left, responses (B, T) on the right; masks are 1 on real tokens. A query has a token at least."""
    given, size = (
        (query_ids, query_mask, response_ids, response_mask),
        CPU_ROWS if query_ids.device.type == "cpu" else len(query_ids),
    )
    parts = [
        _logprobs_of_rows(model, temperature, *of_rows)
        for of_rows in zip(*(tensor.split(size) for tensor in given), strict=True)
    ]
    return TokenStats(*map(torch.cat, zip(*parts, strict=True)))


def _logprobs_of_rows(
    model: Any,
    temperature: float,
    query_ids: Tensor,
    query_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
) -> TokenStats:
    mask, ids = torch.cat([query_mask, response_mask], 1), torch.cat([query_ids, response_ids], 1)
    width = int(mask.sum(1).max())
    real_first = (1 - mask).argsort(dim=1, stable=True)[:, :width]
    rows, steps = response_mask.nonzero(as_tuple=True)
    with _hidden_at(model, rows, query_mask.sum(1)[rows] + steps - 1) as hidden:
        logits = model(
            input_ids=ids.gather(1, real_first), attention_mask=mask.gather(1, real_first), use_cache=False
        ).logits
    logprobs, entropy = LogProbability.apply(logits, response_ids[rows, steps], temperature)
    grid = torch.zeros(response_ids.shape, device=logprobs.device)
    return TokenStats(
        grid.index_put((rows, steps), logprobs), grid.index_put((rows, steps), entropy), hidden[0]
    )


def scatter_to_mask(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) values of the real tokens, row by row -> (B, T), zero off the mask."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).index_put(
        mask.nonzero(as_tuple=True), values
    )


class LogProbability(torch.autograd.Function):
    """(logits (N, V), ids (N,), temperature) -> log-probabilities and entropies (N,) in fp32, or fp64.

    As `log_softmax` and `gather` would have it, with one copy of the logits kept for the backward and not three.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(logits.dtype, torch.float32)
        logp, entropy = (
            torch.empty_like(logits, dtype=exact),
            torch.empty(len(logits), dtype=exact, device=logits.device),
        )
        for part in _chunks(logits):
            scaled = logits[part].to(exact)
            torch.log_softmax(scaled if temperature == 1 else scaled / temperature, -1, out=logp[part])
            entropy[part] = -(logp[part].exp() * logp[part]).sum(-1)
        ctx.temperature = temperature
        ctx.save_for_backward(logp, ids, entropy)
        ctx.set_materialize_grads(False)
        ctx.dtype = logits.dtype
        return logp.gather(1, ids[:, None]).squeeze(1), entropy

    @staticmethod
    def backward(
        ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None
    ) -> tuple[Tensor, None, None]:
        """d log p(i) / d logit(j) = [i = j] − p(j), and dH / d logit(j) = −p(j) · (log p(j) + H)."""
        logp, ids, entropy = ctx.saved_tensors
        gradient = torch.empty_like(logp, dtype=ctx.dtype)
        for part in _chunks(logp):
            weight = 0.0 if of_logprobs is None else of_logprobs[part, None]
            if of_entropy is not None:
                weight = weight + of_entropy[part, None] * (logp[part] + entropy[part, None])
            found = logp[part].exp().mul_(-weight)
            if of_logprobs is not None:
                found.scatter_add_(1, ids[part, None], of_logprobs[part, None])
            gradient[part] = found if ctx.temperature == 1 else found / ctx.temperature
        return gradient, None, None


def _chunks(rows: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // max(1, rows.shape[-1]))
    return (slice(start, start + size) for start in range(0, len(rows), size))


@contextmanager
def _hidden_at(model: Any, rows: Tensor, places: Tensor) -> Iterator[list[Tensor]]:
    """The output layer gets the states (B, L, H) at these places alone, (N, H), which are also yielded."""
    layer: nn.Module | None = model.get_output_embeddings()
    if layer is None:
        raise UserError(f"{type(model).__name__} has no output embeddings; expected a causal language model")
    found: list[Tensor] = []

    def pick(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(inputs[0][rows, places])
        return (found[0], *inputs[1:])

    hook = layer.register_forward_pre_hook(pick)
    try:
        yield found
    finally:
        hook.remove()
