"""One forward for everything that scores: rows of ids in, logits out, in batches of like length.

On a decoder the answers to one prompt share what their ids have in common: one row holds `[common][rest 1]…[rest K]`, a 4-D mask lets each
rest see the common part and itself, and positions go on from the common part in each rest. On an encoder each answer is a row.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.reward.encoding import Encoded

logger = logging.getLogger(__name__)

TOKENS = 4096  # of a batch, padding included

# Padding that is worth saving a forward, in tokens: little where the arithmetic takes the time, much where starting kernels does.
PADDING = {"cpu": 64, "cuda": 1024}

TOLERANCE = 1e-3  # of the spread of scores in fp32, between a shared prompt and one for each answer; 100 times that in other precisions


class SharedPrefixRow(NamedTuple):
    """A row: the ids that its answers have in common, the rest of each, and which answers these are."""

    common: list[int]
    rests: list[list[int]]
    answers: list[int]

    @property
    def width(self) -> int:
        return len(self.common) + sum(map(len, self.rests))


def compute_logits(
    model: Any,
    groups: Sequence[Sequence[Encoded]],
    pad: int,
    *,
    shared: bool,
    batch_size: int = 64,
    types: bool = False,
    at_once: bool = False,
) -> Tensor:
    """(answers of all groups, C): the logits of each answer, in order. A group is the answers to one prompt.

    `shared` computes what they have in common once (see `can_share`). At most `batch_size` answers go through the model together; `at_once`
    all, whatever the padding: where weights are sharded over ranks, these must agree in how many forwards they take.
    """
    answers = [answer for group in groups for answer in group]
    rows = (
        list(_prefix_rows(groups, batch_size, _inner(model).config.get_text_config().hidden_size))
        if shared
        else [SharedPrefixRow([], [answer.ids], [i]) for i, answer in enumerate(answers)]
    )
    found: list[Tensor] = []
    order: list[int] = []
    for batch in [rows] if at_once else _batches(rows, batch_size, PADDING.get(_device(model).type, 1024)):
        order += [answer for tree in batch for answer in tree.answers]
        if any(tree.common for tree in batch):
            found.append(_forward_prefix_rows(model, batch, pad))
        else:
            found.append(_forward_rows(model, [answers[tree.answers[0]] for tree in batch], pad, types))
    return torch.cat(found)[torch.tensor(order, device=found[0].device).argsort()]


def score_head(model: Any) -> nn.Module | None:
    """The module that scores every token of a decoder; None where the model pools first, as encoders do."""
    inner = _inner(model)
    return getattr(inner.get_base_model() if hasattr(inner, "get_base_model") else inner, "score", None)


@torch.no_grad()
def supports_prefix_sharing(model: Any, pad: int, longest: int) -> bool:
    """Whether this model gives answers that share a row the scores they have alone: measured, on ids made for it, in the precision of the
    caller's autocast.

    A sliding window shorter than the `longest` answer would show only in longer rows, so that one is a no.
    """
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    by_place = getattr(text, "window_size", None)  # GPT-Neo's counts places in the row, not positions
    if score_head(model) is None or by_place is not None or (window is not None and window < longest):
        return False
    ids = torch.randint(text.vocab_size, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    group = [
        Encoded(ids[:8] + ids[start:stop], 8, False)
        for start, stop in ((8, 12), (12, 20), (20, 22), (22, 30))
    ]
    with _evaluating(model):
        apart = compute_logits(model, [group], pad, shared=False).float()  # what fails here fails everywhere
        try:
            together = compute_logits(model, [group], pad, shared=True).float()
        except torch.OutOfMemoryError:
            raise
        except (
            ValueError,
            RuntimeError,
            NotImplementedError,
            TypeError,
        ) as error:  # an attention that takes no such mask
            logger.warning(
                "%s takes no mask of its own, so each answer has its prompt to itself: %s",
                type(model).__name__,
                error,
            )
            return False
    # Half precision and quantized weights round by batch shape, so that only gross differences count there.
    exact = (
        model.dtype == torch.float32
        and not getattr(model, "is_quantized", False)
        and not torch.is_autocast_enabled(apart.device.type)
    )
    spread = (apart.max(0).values - apart.min(0).values).max()
    return bool((apart - together).abs().max() <= (TOLERANCE if exact else 100 * TOLERANCE) * spread + 1e-6)


@torch.no_grad()
def check_padding(model: Any, pad: int, source: str) -> None:
    """Refuse a model that scores a row otherwise beside a longer one, as those do that read the last position, padding or not."""
    if score_head(model) is not None:
        return  # read where the row ends
    ids = list(range(min(20, model.config.get_text_config().vocab_size)))
    rows = [[Encoded(ids[:6], 3, False)], [Encoded(ids, 3, False)]]
    with _evaluating(model):
        alone, beside = (
            compute_logits(model, rows[:1], pad, shared=False),
            compute_logits(model, rows, pad, shared=False)[:1],
        )
    if (alone - beside).abs().max() > 0.05 * alone.abs().max() + 1e-3:
        raise UserError(
            f"{source}: a {type(model).__name__} reads padding: its scores would depend on the batch; use another base"
        )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _prefix_rows(
    groups: Sequence[Sequence[Encoded]], batch_size: int, size: int
) -> Iterator[SharedPrefixRow]:
    """Rows for the answers of each group: one joins the last row where that costs less than a row of its own."""
    number = 0
    for group in groups:
        ids = [answer.ids for answer in group]
        common = _common_prefix(ids) if len(ids) > 1 else []
        rests: list[list[int]] = []
        width = len(common)
        for each in ids:
            rest = each[len(common) :]
            joined = _cost(width + len(rest), size) - _cost(width, size)
            apart = not common or joined > _cost(len(each), size)
            if rests and (apart or len(rests) == batch_size or width + len(rest) > TOKENS):
                yield _prefix_row(common, rests, number)
                number, rests, width = number + len(rests), [], len(common)
            rests.append(rest)
            width += len(rest)
        yield _prefix_row(common, rests, number)
        number += len(rests)


def _prefix_row(common: list[int], rests: list[list[int]], number: int) -> SharedPrefixRow:
    alone = [common + rests[0]] if len(rests) == 1 else None
    return SharedPrefixRow([] if alone else common, alone or rests, list(range(number, number + len(rests))))


def _cost(width: int, size: int) -> float:
    """Of a row in a layer of hidden `size`, in what one token costs in its weights: attention adds 4·width²·size to 24·width·size²."""
    return width * (1 + width / (6 * size))


def _common_prefix(part: Sequence[list[int]]) -> list[int]:
    """What all begin with, less than the shortest: each answer keeps one token of its own, where it is read."""
    first, last = min(part), max(part)  # in the order of lists these two differ first
    shortest = min(map(len, part)) - 1
    return first[: next((i for i in range(shortest) if first[i] != last[i]), shortest)]


def _batches(rows: list[SharedPrefixRow], batch_size: int, padding: int) -> Iterator[list[SharedPrefixRow]]:
    """Rows of like width together: at most `batch_size` answers, `TOKENS` tokens and so much `padding`; what shares nothing apart from
    what does."""
    batch: list[SharedPrefixRow] = []
    answers = tokens = 0
    for tree in sorted(rows, key=lambda tree: (not tree.common, tree.width)):
        width = tree.width * (len(batch) + 1)
        full = (
            answers + len(tree.answers) > batch_size
            or width > TOKENS
            or width - tokens - tree.width > padding
        )
        if batch and (full or bool(tree.common) != bool(batch[0].common)):
            yield batch
            batch, answers, tokens = [], 0, 0
        batch.append(tree)
        answers, tokens = answers + len(tree.answers), tokens + tree.width
    yield batch


def _forward_rows(model: Any, rows: Sequence[Encoded], pad: int, types: bool) -> Tensor:
    width = max(len(row.ids) for row in rows)
    fill = lambda values, value: torch.tensor([[*each, *[value] * (width - len(each))] for each in values])  # noqa: E731
    inputs = {
        "input_ids": fill([row.ids for row in rows], pad),
        "attention_mask": fill([[1] * len(row.ids) for row in rows], 0),
    }
    if types:
        inputs["token_type_ids"] = fill(
            [[int(i >= row.answer) for i in range(len(row.ids))] for row in rows], 0
        )
    ends = torch.tensor([len(row.ids) - 1 for row in rows])
    return _gather_logits(model, inputs, torch.arange(len(rows)), ends)


def _forward_prefix_rows(model: Any, trees: Sequence[SharedPrefixRow], pad: int) -> Tensor:
    width = max(tree.width for tree in trees)
    ids = torch.full((len(trees), width), pad)
    positions = torch.zeros_like(ids)
    branch = torch.full_like(ids, -1)  # of each token: 0 in what is common, then 1 to K, -1 behind the end
    rows, ends = [], []
    for i, tree in enumerate(trees):
        parts = [tree.common, *tree.rests]
        start = 0
        for number, part in enumerate(parts):
            place = slice(start, start + len(part))
            ids[i, place] = torch.tensor(part)
            positions[i, place] = torch.arange(len(part)) + (len(tree.common) if number else 0)
            branch[i, place] = number
            start += len(part)
            if number:
                rows.append(i)
                ends.append(start - 1)
    seen = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    mask = (seen & torch.ones(width, width, dtype=torch.bool).tril())[:, None]
    if (
        getattr(_inner(model).config, "_attn_implementation", None) == "eager"
    ):  # which adds the mask to the scores
        dtype = _inner(model).dtype
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return _gather_logits(model, inputs, torch.tensor(rows), torch.tensor(ends))


def _gather_logits(model: Any, inputs: dict[str, Tensor], rows: Tensor, ends: Tensor) -> Tensor:
    """(len(rows), C): of a decoder the logits at the ends, whatever its pad token; else what it pools, one for each row."""
    device = _device(model)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    scorer = score_head(model)
    if scorer is None:
        return model(**inputs).logits
    with _output(scorer) as found:
        model(**inputs, use_cache=False)
    return found[0][rows.to(device), ends.to(device)]


def _inner(model: Any) -> Any:
    """The model that DistributedDataParallel wraps."""
    return getattr(model, "module", model)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _output(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module gives in the forwards of this block: a decoder's own forward throws away all tokens' logits but one."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        yield found
    finally:
        hook.remove()
