"""Per-token log-probabilities and entropies of responses; the output layer runs on response positions only.

Rows go through the model without a gap between query and response. The output layer gets only the hidden
states that predict a response token: the logits, with a number per vocabulary entry for each token, take most
of a language model's memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.patches import without_router_logits
from pipeline.models.probes import can_mix, reads_padding, require_positions
from pipeline.models.truncation import Truncation, truncated_logprobs

# Elements of an (N, V) tensor processed at a time.
CHUNK = 2**22

# Rows per forward on a CPU: more bring no speed, and a few rows sorted by length need less padding.
CPU_ROWS = 16

# Numbers in the logits of a forward without gradients: 3.2 GB in bf16 with their copy in fp32.
MAX_LOGITS = 2**29


class TokenStats(NamedTuple):
    """Log-probabilities and entropies in nats (B, T), zero off the mask, and hidden states (N, H).

    The hidden states are the last layer's at the positions that predict the N real tokens, row by row.
    `truncated` are log-probabilities (B, T) under a truncation, without gradient; None if none was given.
    """

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor
    truncated: Tensor | None = None


def response_logprobs(
    model: Any,
    query_ids: Tensor,
    query_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
) -> TokenStats:
    """Return the `TokenStats` of responses (B, T) to queries (B, P).

    Queries are padded on the left, responses on the right. Masks are 1 on real tokens. Every query has at
    least one token. If padding changes the model's logits, rows are read one by one. Raises `UserError` if
    the model has no output embeddings, is no decoder, or has too few positions.
    """
    _require_output_layer(model)
    chunks = _split_rows(model, query_ids, query_mask, response_ids, response_mask)
    parts = [_logprobs_of_rows(model, temperature, truncation, *chunk) for chunk in chunks]
    *columns, truncated = zip(*parts, strict=True)
    stats = TokenStats(*map(torch.cat, columns))
    return stats if truncation is None else stats._replace(truncated=torch.cat(truncated))


def rows_within_budget(model: Any, tokens: int) -> int:
    """Return how many responses of `tokens` tokens have at most `MAX_LOGITS` logits together; at least 1.

    It is a number for reading without gradients. Training and what it compares itself with need equal
    batches.
    """
    return max(1, MAX_LOGITS // (tokens * model.config.get_text_config().vocab_size))


def response_states(
    trunk: Any, query_ids: Tensor, query_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> Tensor:
    """Return the last hidden states (N, H) of a model without output layer, as `TokenStats.hidden` has them.

    The arguments are those of `response_logprobs`.
    """
    states = []
    for chunk in _split_rows(trunk, query_ids, query_mask, response_ids, response_mask):
        inputs, rows, _, positions = _align_rows(trunk, *chunk)
        with without_router_logits(trunk):
            states.append(trunk(**inputs, use_cache=False).last_hidden_state[rows, positions])
    return torch.cat(states)


def _split_rows(model: Any, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split the four tensors of a batch into the rows that go through the model together."""
    query_ids, query_mask, _, response_mask = tensors
    size = CPU_ROWS if query_ids.device.type == "cpu" else len(query_ids)
    longest = int((query_mask.sum(1) + response_mask.sum(1)).max())
    if not reads_padding(model) or not can_mix(model, longest):
        size = 1
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def _align_rows(
    model: Any, query_ids: Tensor, query_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return the model's inputs, without a gap between query and response and padded on the right.

    Also returns, for each of the N real response tokens, its row, its number in the response, and the
    position in the inputs that predicts it.
    """
    mask, ids = torch.cat([query_mask, response_mask], 1), torch.cat([query_ids, response_ids], 1)
    width = int(mask.sum(1).max())
    require_positions(model, width)
    real_first = (1 - mask).argsort(dim=1, stable=True)[:, :width]

    rows, steps = response_mask.nonzero(as_tuple=True)
    positions = query_mask.sum(1)[rows] + steps - 1
    inputs = {"input_ids": ids.gather(1, real_first), "attention_mask": mask.gather(1, real_first)}
    return inputs, rows, steps, positions


def _logprobs_of_rows(
    model: Any,
    temperature: float,
    truncation: Truncation | None,
    query_ids: Tensor,
    query_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
) -> TokenStats:
    inputs, rows, steps, positions = _align_rows(model, query_ids, query_mask, response_ids, response_mask)
    with _select_hidden(model, rows, positions) as hidden, without_router_logits(model):
        logits = model(**inputs, use_cache=False).logits

    ids, truncated = response_ids[rows, steps], None
    logprobs, entropy = LogProbability.apply(logits, ids, temperature)
    grid = torch.zeros(response_ids.shape, dtype=logprobs.dtype, device=logprobs.device)
    if truncation is not None:
        values = truncated_logprobs(logits, ids, steps, temperature, truncation)
        truncated = grid.index_put((rows, steps), values)
    return TokenStats(
        grid.index_put((rows, steps), logprobs), grid.index_put((rows, steps), entropy), hidden[0], truncated
    )


def scatter_to_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Return the (N,) values of the real tokens, row by row, as (B, T), zero off the mask."""
    grid = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return grid.index_put(mask.nonzero(as_tuple=True), values)


class LogProbability(torch.autograd.Function):
    """(logits (N, V), ids (N,), temperature) -> log-probabilities and entropies (N,) in fp32, or fp64.

    The values are those of `log_softmax` and `gather`. The backward keeps one copy of the logits, not three.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Compute chunks of rows at a time, so that only one (N, V) tensor exists at full precision."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp = torch.empty_like(logits, dtype=dtype)
        entropy = torch.empty(len(logits), dtype=dtype, device=logits.device)
        for chunk in _row_chunks(logits):
            scaled = logits[chunk].to(dtype)
            torch.log_softmax(scaled if temperature == 1 else scaled / temperature, -1, out=logp[chunk])
            entropy[chunk] = -(logp[chunk].exp() * logp[chunk]).sum(-1)

        ctx.temperature = temperature
        ctx.dtype = logits.dtype
        ctx.save_for_backward(logp, ids, entropy)
        ctx.set_materialize_grads(False)
        return logp.gather(1, ids[:, None]).squeeze(1), entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None]:
        """Apply d log p(i) / d logit(j) = [i = j] − p(j), and dH / d logit(j) = −p(j) · (log p(j) + H)."""
        logp, ids, entropy = ctx.saved_tensors
        grad_logits = torch.empty_like(logp, dtype=ctx.dtype)
        for chunk in _row_chunks(logp):
            weight = 0.0 if grad_logprobs is None else grad_logprobs[chunk, None]
            if grad_entropy is not None:
                weight = weight + grad_entropy[chunk, None] * (logp[chunk] + entropy[chunk, None])
            grad = logp[chunk].exp().mul_(-weight)
            if grad_logprobs is not None:
                grad.scatter_add_(1, ids[chunk, None], grad_logprobs[chunk, None])
            grad_logits[chunk] = grad if ctx.temperature == 1 else grad / ctx.temperature
        return grad_logits, None, None


def _row_chunks(rows: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // max(1, rows.shape[-1]))
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _require_output_layer(model: Any) -> nn.Module:
    layer: nn.Module | None = model.get_output_embeddings()
    if layer is None:
        raise UserError(f"{type(model).__name__} has no output embeddings; expected a causal language model")
    return layer


@contextmanager
def _select_hidden(model: Any, rows: Tensor, positions: Tensor) -> Iterator[list[Tensor]]:
    """Reduce the input of the output layer from (B, L, H) to the states (N, H) at these rows and positions.

    Yields a list that contains these states after the forward.
    """
    layer = _require_output_layer(model)
    selected: list[Tensor] = []

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        selected.append(inputs[0][rows, positions])
        return (selected[0], *inputs[1:])

    hook = layer.register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        hook.remove()
