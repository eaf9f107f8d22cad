"""The forward pass of everything that scores: rows of token ids to logits, in batches of similar length.

On a decoder, the responses to one prompt share the prefix that their ids have in common. One row is
`[prefix][suffix 1]…[suffix K]`. A 4-D mask lets each suffix attend to the prefix and to itself, and the
positions of each suffix continue from the prefix. On an encoder, each response is a row.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.probing import unwrap
from pipeline.reward.encoding import Encoded

MAX_WIDTH = 4096  # tokens of a row of several responses, whose mask has the square of it
MAX_TOKENS = {"cpu": 4096, "cuda": 16384}  # of a batch, padding included: a GPU wants larger ones

# Most tokens of padding in a batch; more padding costs more than another forward. The limit is low on a CPU,
# where the time goes into arithmetic, and high on a GPU, where it goes into kernel launches.
MAX_PADDING = {"cpu": 64, "cuda": 4096}


class SharedPrefixRow(NamedTuple):
    """A row of one or more responses: their common prefix, the remaining ids of each, and their indices."""

    prefix: list[int]
    suffixes: list[list[int]]
    responses: list[int]

    @property
    def width(self) -> int:
        """The number of tokens in the row."""
        return len(self.prefix) + sum(map(len, self.suffixes))


def compute_logits(
    model: Any,
    groups: Sequence[Sequence[Encoded]],
    pad_token_id: int,
    *,
    share_prefixes: bool,
    batch_size: int = 64,
    use_token_types: bool = False,
    padding: bool = True,
    single_batch: bool = False,
) -> Tensor:
    """Return the logits (outputs, C) of all responses in order; a group is the responses to one prompt.

    A response has one output, or one for each of its steps that was not cut (`Encoded.positions`).
    `share_prefixes` computes the common prefix of a group once; `pipeline.reward.probes` tells which models
    allow that, and `padding`. Without `padding`, the rows of a batch have one length. At most `batch_size`
    responses are in one forward. `single_batch` puts all responses into one forward, whatever the padding:
    with weights sharded over ranks, every rank must run the same number of forwards.
    """
    encoded = [response for group in groups for response in group]
    positions = [response.positions for response in encoded]
    if share_prefixes:
        hidden_size = unwrap(model).config.get_text_config().hidden_size
        rows = list(_prefix_rows(groups, batch_size, hidden_size, use_token_types))
    else:
        rows = [SharedPrefixRow([], [response.ids], [i]) for i, response in enumerate(encoded)]

    device = _device(model).type
    max_padding = MAX_PADDING.get(device, 1024) if padding else 0
    max_tokens = MAX_TOKENS.get(device, MAX_WIDTH)
    logits: list[Tensor] = []
    order: list[int] = []
    for batch in [rows] if single_batch else _batches(rows, batch_size, max_tokens, max_padding):
        order += [response for row in batch for response in row.responses]
        if any(row.prefix for row in batch):
            starts = [response.response_start for response in encoded] if use_token_types else None
            logits.append(_forward_prefix_rows(model, batch, pad_token_id, positions, starts))
        else:
            alone = [encoded[row.responses[0]] for row in batch]
            logits.append(_forward_rows(model, alone, pad_token_id, use_token_types))
    outputs = expand_order(order, list(map(len, positions)))
    return torch.cat(logits)[torch.tensor(outputs, device=logits[0].device).argsort()]


def expand_order(order: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Return the indices of the outputs of responses in this order; response i has `counts[i]` outputs.

    >>> expand_order([2, 0, 1], [1, 2, 3])
    [3, 4, 5, 0, 1, 2]
    """
    ends = list(accumulate(counts))
    return [output for i in order for output in range(ends[i] - counts[i], ends[i])]


def score_head(model: Any) -> nn.Module | None:
    """Return the module that scores every token of a decoder.

    None for a model that pools first, as encoders do.
    """
    return getattr(unwrap(model), "score", None)


def scores_tokens(model: Any) -> bool:
    """Return whether the model is a token classifier, whose forward returns the logits of every token."""
    return type(unwrap(model)).__name__.endswith("ForTokenClassification")


def _prefix_rows(
    groups: Sequence[Sequence[Encoded]], batch_size: int, hidden_size: int, use_token_types: bool = False
) -> Iterator[SharedPrefixRow]:
    """Yield rows for the responses of each group.

    A response joins the previous row if that costs less than a row of its own. With token types, those of a
    prefix are common too.
    """
    first = 0  # index of the first response of the current row
    for group in groups:
        prefix = _common_prefix([response.ids for response in group]) if len(group) > 1 else []
        if use_token_types and len({response.response_start for response in group}) > 1:
            prefix = prefix[: min(response.response_start for response in group)]
        suffixes: list[list[int]] = []
        width = len(prefix)
        for response in group:
            suffix = response.ids[len(prefix) :]
            added_cost = _cost(width + len(suffix), hidden_size) - _cost(width, hidden_size)
            separate = not prefix or added_cost > _cost(len(response.ids), hidden_size)
            full = len(suffixes) == batch_size or width + len(suffix) > MAX_WIDTH
            if suffixes and (separate or full):
                yield _prefix_row(prefix, suffixes, first)
                first, suffixes, width = first + len(suffixes), [], len(prefix)
            suffixes.append(suffix)
            width += len(suffix)
        yield _prefix_row(prefix, suffixes, first)
        first += len(suffixes)


def _prefix_row(prefix: list[int], suffixes: list[list[int]], first: int) -> SharedPrefixRow:
    responses = list(range(first, first + len(suffixes)))
    if len(suffixes) == 1:  # nothing to share
        return SharedPrefixRow([], [prefix + suffixes[0]], responses)
    return SharedPrefixRow(prefix, suffixes, responses)


def _cost(width: int, hidden_size: int) -> float:
    """Return the cost of a row in one layer, in units of a token's cost in the weights.

    Attention adds 4·width²·size to 24·width·size².
    """
    return width * (1 + width / (6 * hidden_size))


def _common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """Return the prefix of all rows, at most the shortest row without its last id.

    Each response keeps at least one id of its own, where its score is taken.
    """
    first, last = min(rows), max(rows)  # in the order of lists, these two differ first
    shortest = min(map(len, rows)) - 1
    return first[: next((i for i in range(shortest) if first[i] != last[i]), shortest)]


def _batches(
    rows: list[SharedPrefixRow], batch_size: int, max_tokens: int, max_padding: int
) -> Iterator[list[SharedPrefixRow]]:
    """Yield batches of rows of similar width.

    A batch has at most `batch_size` responses, `max_tokens` tokens and `max_padding` tokens of padding. Rows
    with and without a shared prefix are in separate batches.
    """
    batch: list[SharedPrefixRow] = []
    responses = tokens = 0
    for row in sorted(rows, key=lambda row: (not row.prefix, row.width)):
        padded = row.width * (len(batch) + 1)
        full = (
            responses + len(row.responses) > batch_size
            or padded > max_tokens
            or padded - tokens - row.width > max_padding
        )
        if batch and (full or bool(row.prefix) != bool(batch[0].prefix)):
            yield batch
            batch, responses, tokens = [], 0, 0
        batch.append(row)
        responses, tokens = responses + len(row.responses), tokens + row.width
    yield batch


def _forward_rows(model: Any, rows: Sequence[Encoded], pad_token_id: int, use_token_types: bool) -> Tensor:
    lengths = [len(row.ids) for row in rows]
    inputs = {
        "input_ids": _pad([row.ids for row in rows], pad_token_id),
        "attention_mask": _pad([[1] * length for length in lengths], 0),
    }
    if use_token_types:
        types = [[int(i >= row.response_start) for i in range(len(row.ids))] for row in rows]
        inputs["token_type_ids"] = _pad(types, 0)
    outputs = [(i, position) for i, row in enumerate(rows) for position in row.positions]
    return _gather_logits(model, inputs, outputs)


def _pad(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _forward_prefix_rows(
    model: Any,
    rows: Sequence[SharedPrefixRow],
    pad_token_id: int,
    wanted: Sequence[Sequence[int]],
    response_starts: list[int] | None,
) -> Tensor:
    """Return the logits of the responses in `rows` at their `wanted` positions.

    `wanted` has those of all responses, and so has `response_starts`, for token types.
    """
    width = max(row.width for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    positions, types = torch.zeros_like(ids), torch.zeros_like(ids)
    segments = torch.full_like(
        ids, -1
    )  # of each token: 0 in the prefix, 1 to K in the suffixes, -1 in the padding
    outputs: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        start = 0
        for segment, part in enumerate([row.prefix, *row.suffixes]):
            place = slice(start, start + len(part))
            ids[i, place] = torch.tensor(part)
            positions[i, place] = torch.arange(len(part)) + (len(row.prefix) if segment else 0)
            segments[i, place] = segment
            if response_starts is not None:
                response_start = response_starts[row.responses[max(segment - 1, 0)]]
                types[i, place] = (positions[i, place] >= response_start).long()
            if segment:  # a position may be in the shared prefix
                shift = start - len(row.prefix)
                own = wanted[row.responses[segment - 1]]
                outputs += [(i, p + shift if p >= len(row.prefix) else p) for p in own]
            start += len(part)
    inputs = {
        "input_ids": ids,
        "attention_mask": _segment_mask(unwrap(model), segments.to(_device(model))),
        "position_ids": positions,
    }
    if response_starts is not None:
        inputs["token_type_ids"] = types
    return _gather_logits(model, inputs, outputs)


def _segment_mask(model: Any, segments: Tensor) -> Tensor:
    """Return the causal mask (rows, 1, width, width) in which a token sees the prefix and its own segment."""
    width = segments.shape[1]
    visible = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
    mask = (visible & torch.ones(width, width, dtype=torch.bool, device=segments.device).tril())[:, None]
    if getattr(model.config, "_attn_implementation", None) != "eager":
        return mask
    # Eager attention adds the mask to its scores.
    zeros = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(model.dtype).min)


def _gather_logits(model: Any, inputs: dict[str, Tensor], outputs: Sequence[tuple[int, int]]) -> Tensor:
    """Return the logits (len(outputs), C) at pairs of a row and a token, whatever the pad token.

    An encoder that pools has one output per row instead.
    """
    device = _device(model)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    rows, tokens = torch.tensor(outputs, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    if scores_tokens(model):
        has_cache = "use_cache" in inspect.signature(unwrap(model).forward).parameters
        return model(**inputs, **{"use_cache": False} if has_cache else {}).logits[rows, tokens]
    head = score_head(model)
    if head is None:
        return model(**inputs).logits
    with _capture_outputs(head) as captured:
        model(**inputs, use_cache=False)
    return captured[0][rows, tokens]


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _capture_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module in this block.

    A decoder's own forward discards the logits of all tokens but one.
    """
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()
