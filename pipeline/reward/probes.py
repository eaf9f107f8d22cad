"""How a classifier may be batched, asked of the model itself.

Neither padding nor a shared prefix should change a score, but in some architectures they do.
"""

import inspect
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from pipeline.errors import UserError
from pipeline.models.patches import forget_earlier_rows
from pipeline.models.positions import max_positions, mixing_limit
from pipeline.models.probes import model_name
from pipeline.models.probing import ask_once, differs, eval_mode, explain, made_up_ids, remember, unwrap
from pipeline.reward.batching import compute_logits, score_head, scores_tokens
from pipeline.reward.encoding import Encoded

logger = logging.getLogger(__name__)

# Largest difference between scores with a shared prefix and without, as a fraction of the range of the
# scores, in fp32. In other precisions it is 100 times as large.
TOLERANCE = 1e-3

SHORT, LONG = 6, 19  # tokens of the rows that are scored; some models pad to a multiple of 4
SHORT_ROWS = 4  # padding may leave one score as it is, such as where an activation is 0


def supports_padding(model: Any, max_length: int, source: str | None = None) -> bool:
    """Return whether rows of different lengths, up to `max_length` tokens, may share a batch.

    A warning is logged if not. Raises `UserError` that names `source` if the model cannot score a plain row,
    or if a score depends on another row of the same length, or on chance.
    """
    batching = _describe(model)
    if batching.defect:
        raise UserError(f"{source or model_name(model)}: {type(unwrap(model)).__name__} {batching.defect}")
    limit = mixing_limit(model)
    if not batching.padding or (limit is not None and limit < max_length):
        _warn(model)
        return False
    return True


@remember
def _warn(model: Any) -> None:
    name = type(model).__name__
    logger.warning(
        "%s: padding changes the scores of %s, so rows of one length form a batch", model_name(model), name
    )


class _Batching(NamedTuple):
    """Why the model cannot be batched, if so, and whether its scores do not depend on padding."""

    defect: str | None = None
    padding: bool = True


@ask_once(default=_Batching())
def _describe(model: Any) -> _Batching:
    forget_earlier_rows(model)
    rows = _rows(model)
    try:
        alone = _scores_alone(model, rows)
        of_one_length = _scores_together(model, rows[-2:])
    except Exception as error:
        lengths = f"{len(rows[0])} and {len(rows[-1])}"
        return _Batching(f"cannot score rows of {lengths} tokens: {explain(error)}; use another base")
    if differs(alone[-2:], of_one_length, model):
        return _Batching("has scores that depend on the rows beside them, or on chance; use another base")

    try:
        return _Batching(padding=not differs(alone[:-1], _scores_together(model, rows[:-1]), model))
    except Exception as error:
        explain(error)
        return _Batching(padding=False)


def _rows(model: Any) -> list[list[int]]:
    """Return short rows and two long ones; they end with EOS, where BART and T5 take the score."""
    longest = min(limit or LONG for limit in (LONG, max_positions(model), mixing_limit(model)))
    rows = made_up_ids(model, *[min(SHORT, longest)] * SHORT_ROWS, longest, longest)
    eos = model.config.get_text_config().eos_token_id
    return [[*row[:-1], eos] for row in rows] if isinstance(eos, int) else rows


def _scores_alone(model: Any, rows: list[list[int]]) -> Tensor:
    return torch.cat([_scores_together(model, [row]) for row in rows])


def _scores_together(model: Any, rows: list[list[int]]) -> Tensor:
    groups = [[Encoded(row, len(row), False)] for row in rows]
    pad_token_id = model.config.get_text_config().pad_token_id or 0
    return compute_logits(model, groups, pad_token_id, share_prefixes=False, single_batch=True)


def is_decoder(model: Any) -> bool:
    """Return whether a classifier reads from left to right: no token changes the output of an earlier one."""
    if not scores_tokens(model):
        return score_head(model) is not None
    is_causal = _is_causal(model)
    config = unwrap(model).config.get_text_config()
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING if is_causal is None else is_causal


@ask_once(default=None)
def _is_causal(model: Any) -> bool | None:
    forget_earlier_rows(model)
    (row,) = made_up_ids(model, min(limit or SHORT for limit in (SHORT, max_positions(model))))
    positions = list(range(len(row) - 1))
    ids = [row, [*row[:-1], row[-1] + 1]]
    try:
        groups = [[Encoded(row, 0, False, positions)] for row in ids]
        logits = compute_logits(model, groups, 0, share_prefixes=False, single_batch=True)
    except Exception as error:
        explain(error)
        return None
    return not differs(logits[: len(positions)], logits[len(positions) :], model)


def accepts_token_types(model: Any) -> bool:
    """Return whether the model reads token types, and has both: a RoBERTa has one, and fails with another."""
    model = unwrap(model)
    parameters = inspect.signature(type(model).forward).parameters
    is_read = "token_type_ids" in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )
    return is_read and getattr(model.config.get_text_config(), "type_vocab_size", None) != 1


@torch.no_grad()
def supports_prefix_sharing(model: Any, pad_token_id: int, max_length: int) -> bool:
    """Check on synthetic ids that responses behind a shared prefix keep the scores that they have alone.

    The check runs in the precision of the caller's autocast. A sliding window shorter than `max_length`
    changes scores only in rows longer than those of the check, so the result is False for such a model.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    row_window = getattr(config, "window_size", None)  # GPT-Neo's counts indices in the row, not positions
    if not is_decoder(model) or row_window is not None or (window is not None and window < max_length):
        return False

    ids = torch.randint(config.vocab_size, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    suffixes = ((8, 12), (12, 20), (20, 22), (22, 30))
    group = [Encoded(ids[:8] + ids[start:stop], 8, False) for start, stop in suffixes]
    with eval_mode(model):
        # An error here is the model's own and would occur in every forward.
        expected = compute_logits(model, [group], pad_token_id, share_prefixes=False).float()
        try:
            shared = compute_logits(model, [group], pad_token_id, share_prefixes=True).float()
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
            logger.warning(
                "%s does not support a 4-D attention mask, so prefixes are not shared: %s",
                type(model).__name__,
                error,
            )
            return False

    # Half precision and quantized weights round by batch shape, so only gross differences count there.
    exact = (
        model.dtype == torch.float32
        and not getattr(model, "is_quantized", False)
        and not torch.is_autocast_enabled(expected.device.type)
    )
    score_range = (expected.max(0).values - expected.min(0).values).max()
    tolerance = TOLERANCE if exact else 100 * TOLERANCE
    return bool((expected - shared).abs().max() <= tolerance * score_range + 1e-6)
