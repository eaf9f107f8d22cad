"""How a causal language model may be sampled and read, asked of the model itself.

Neither padding nor a cache nor a later token should change the logits of a row, but in some architectures
they do. `generate` and `response_logprobs` then batch rows of equal length, or single rows, or leave the
cache out. Nor should a row change if others leave or join its batch; if it does, a batch stays as it is. What
cannot be made right is refused.

The answers are computed at the first call. Ask before training starts: inside DDP or FSDP, a forward of one
process alone would wait for the others.
"""

import logging
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from pipeline.errors import UserError
from pipeline.models.chat import pad_rows
from pipeline.models.decoding import Limits, Sampling, decode
from pipeline.models.patches import forget_earlier_rows, without_router_logits
from pipeline.models.positions import max_positions, mixing_limit
from pipeline.models.probing import ask_once, differs, explain, made_up_ids, remember, unwrap

logger = logging.getLogger(__name__)

SHORT, LONG, STEPS = 3, 10, 2  # tokens of two prompts, and of the responses to them


def model_name(model: Any) -> str:
    """Return where a model was loaded from."""
    return str(getattr(model, "name_or_path", "")) or "model"


def require_positions(model: Any, tokens: int) -> None:
    """Raise `UserError` if a row of so many tokens is longer than the model can read."""
    positions = max_positions(model)
    if positions is not None and tokens > positions:
        raise UserError(
            f"{model_name(model)}: reads at most {positions} tokens, but a prompt with its response has "
            f"{tokens}; lower response_tokens or max_prompt_tokens"
        )


def require_decoder(model: Any, source: str | None = None) -> None:
    """Raise `UserError` if the model cannot read a plain row, or sees the tokens that it is to predict."""
    if defect := _find_defect(model):
        raise UserError(f"{source or model_name(model)}: {type(unwrap(model)).__name__} {defect}")


@ask_once(default=None)
def _find_defect(model: Any) -> str | None:
    forget_earlier_rows(model)
    length = min(LONG, max_positions(model) or LONG)
    (row,) = made_up_ids(model, length)
    others = [*row[:-1], row[-1] + 1]
    try:
        logits = _read(model, torch.tensor([row, others]))
    except Exception as error:
        return f"cannot read a row of {length} tokens: {explain(error)}; expected a causal language model"
    if differs(logits[0, :-1], logits[1, :-1], model):
        return "sees the tokens that it is to predict (it is an encoder); expected a decoder"
    return None


@ask_once(default=True)
def reads_padding(model: Any) -> bool:
    """Return whether rows of different lengths may be read together, padded on the right.

    A warning is logged if not. Raises `UserError` as `require_decoder` does.
    """
    require_decoder(model)
    rows = made_up_ids(model, *_lengths(model))
    padded = _read(model, *pad_rows(rows, _pad_token_id(model)))
    changed = any(
        differs(_read_alone(model, row), logits[: len(row)], model)
        for row, logits in zip(rows, padded, strict=True)
    )
    if changed:
        _warn(model, "padding changes the logits of %s, so its rows are read one by one")
    return not changed


def describe_sampling(model: Any, tokens: int = 0) -> Sampling:
    """Return how the model is sampled from the distribution that reading plain rows computes.

    `tokens` is the length of the longest prompt with its response. A warning is logged if prompts cannot
    share a batch, or without a cache. Raises `UserError` if no way is right, and as `require_decoder` does.
    """
    way = _describe_sampling(model)
    if not can_mix(model, tokens):
        # A cache has the keys of earlier steps, at another scale.
        way = Sampling(padding=False, cache=False, compact=way.compact)
        _warn_of_length(model)
    return way


def can_mix(model: Any, tokens: int) -> bool:
    """Return whether rows of different lengths, up to so many tokens, compute what they compute alone."""
    limit = mixing_limit(model)
    return limit is None or tokens <= limit


@remember
def _warn_of_length(model: Any) -> None:
    _warn(model, "the positions of %s depend on the longest row, so long rows are sampled and read apart")


@ask_once(default=Sampling(compact=False))
def _describe_sampling(model: Any) -> Sampling:
    require_decoder(model)
    ways = (Sampling(padding, cache, compact) for cache, padding, compact in product((True, False), repeat=3))
    way = next((way for way in ways if _samples_right(model, way)), None)
    if way is None:
        raise UserError(
            f"{model_name(model)}: what {type(model).__name__} generates does not follow the logits of plain "
            "rows, with or without a cache; use another policy"
        )

    if not way.padding:
        _warn(model, "padding changes the samples of %s, so prompts of one length form a batch")
    if not way.cache:
        _warn(model, "its cache changes the samples of %s, so it generates without one, slowly")
    return way


def _warn(model: Any, text: str) -> None:
    logger.warning(f"%s: {text}", model_name(model), type(model).__name__)


def _lengths(model: Any) -> tuple[int, int]:
    """Return the lengths of a short and a long prompt that fit the model with their responses, and mix."""
    limits = (LONG + STEPS, max_positions(model), mixing_limit(model))
    long = min(limit for limit in limits if limit is not None) - STEPS
    return min(SHORT, max(1, long - 1)), max(1, long)


def _pad_token_id(model: Any) -> int:
    return model.config.get_text_config().pad_token_id or 0


def state_width(trunk: Any) -> int:
    """Return the size of the last hidden state of a model without output layer."""
    return _state_width(trunk) or int(trunk.config.get_text_config().hidden_size)


@ask_once(default=0)
def _state_width(trunk: Any) -> int:
    return _read(trunk, torch.tensor(made_up_ids(trunk, 1))).shape[-1]


def _read(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits (B, L, V) of rows, padded on the right if there is a mask.

    A model without output layer has its last hidden states (B, L, H) instead.
    """
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with without_router_logits(model):
        output = model(**inputs, use_cache=False)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def _read_alone(model: Any, row: list[int]) -> Tensor:
    return _read(model, torch.tensor([row]))[0]


class _Recorder(LogitsProcessor):
    """Append the logits (V,) of each step to the row's list, and let its next forced token be generated."""

    def __init__(self, logits: Sequence[list[Tensor]], tokens: Sequence[list[int]]):
        self.logits, self.tokens = logits, tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        for i, (logits, tokens) in enumerate(zip(self.logits, self.tokens, strict=True)):
            forced[i, tokens[min(len(logits), len(tokens) - 1)]] = 0.0
            logits.append(scores[i].clone())
        return forced  # type: ignore[return-value]


def _samples_right(model: Any, way: Sampling) -> bool:
    """Return whether `decode` computes the logits of plain rows for each token of forced responses.

    The first of three rows ends at once, so it leaves, and a fourth takes its place.
    """
    short, long = _lengths(model)
    prompts = made_up_ids(model, *([short, short] if way.padding else [long, long]), long, long)
    others = made_up_ids(model, *[STEPS] * 3)
    end = min(set(range(3 * STEPS + 1)).difference(*others))  # a token of no other response
    responses = [[end], *others]
    recorded: list[list[Tensor]] = [[] for _ in prompts]

    def processors(rows: list[int], _: list[int]) -> LogitsProcessorList:
        recorder = _Recorder([recorded[row] for row in rows], [responses[row] for row in rows])
        return LogitsProcessorList([recorder])

    limits, pad = Limits(STEPS, [end]), _pad_token_id(model)
    try:
        decode(model, prompts, processors, limits, pad_token_id=pad, batch_size=3, way=way)
    except Exception as error:
        logger.debug("%s", explain(error))
        return False
    plain = [
        _read_alone(model, prompt + response)[len(prompt) - 1 : -1]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return not any(
        differs(logits, torch.stack(sampled[: len(logits)]), model)
        for logits, sampled in zip(plain, recorded, strict=True)
    )
