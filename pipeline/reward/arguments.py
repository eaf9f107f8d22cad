"""Check what a program passes to `RewardModel`, before anything is loaded or computed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.config.values import shorten
from pipeline.errors import UserError, one_line
from pipeline.reward.settings import RewardSettings

PRECISIONS = ("fp32", "bf16", "fp16")
SET_BY_REWARD_JSON = ("quantization", "auto_class", "head")


def check_load(source: Any, precision: Any, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    """Raise `UserError` if an argument of `RewardModel.load` is of another kind."""
    _expect("source", source, isinstance(source, str | Path), "the path or hub id of a classifier")
    if precision not in PRECISIONS:
        raise UserError(f"precision={shorten(precision)}: expected one of {', '.join(PRECISIONS)}")
    if model is not None:
        _expect_model(model)
    if tokenizer is not None:
        _expect_tokenizer(tokenizer)
    for name in options:
        if name in SET_BY_REWARD_JSON:
            raise UserError(f"load: {name}: reward.json and the model's own config set it; remove it")
    revision, trusts = options.get("revision"), options.get("trust_remote_code")
    _expect("revision", revision, isinstance(revision, str | None), "text, or None")
    _expect("trust_remote_code", trusts, isinstance(trusts, bool | None), "True or False")


def check_parts(model: Any, tokenizer: Any, settings: Any) -> None:
    """Raise `UserError` if one of the parts of a `RewardModel` is of another kind."""
    _expect_model(model)
    _expect_tokenizer(tokenizer)
    _expect(
        "settings", settings, isinstance(settings, RewardSettings), "RewardSettings; use RewardModel.load"
    )


def move_model(model: Any, device: Any) -> Any:
    """Return the model on a device, by default on the GPU if there is one. Raises `UserError`."""
    if device is None:
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"load: device={shorten(device)}: {one_line(error)}; expected a device of this machine, such as "
            "'cpu' or 'cuda:0'"
        ) from None


def check_scale(alpha: Any, normalize: Any) -> None:
    """Raise `UserError` unless `alpha` is a finite number or None, and `normalize` is true or false."""
    if alpha is not None and not _is_finite(alpha):
        raise UserError(f"alpha={shorten(alpha)}: expected a finite number, or None")
    if not isinstance(normalize, bool):
        raise UserError(f"normalize={shorten(normalize)}: expected True or False")


def check_step_scores(steps: Any) -> None:
    """Raise `UserError` unless `steps` has for each response a list of numbers, one for each step."""
    rows = steps if isinstance(steps, Sequence) and not isinstance(steps, str | bytes) else [steps]
    for number, row in enumerate(rows):
        is_list = isinstance(row, Sequence) and not isinstance(row, str | bytes)
        if not is_list or not row or not all(map(_is_finite, row)):
            raise UserError(
                f"steps[{number}]: expected the scores of the steps of a response, finite numbers, found "
                f"{shorten(row)}"
            )


def _expect_model(model: Any) -> None:
    is_model = isinstance(model, nn.Module) and hasattr(model, "config")
    _expect("model", model, is_model, "a classifier of transformers")


def _expect_tokenizer(tokenizer: Any) -> None:
    _expect(
        "tokenizer", tokenizer, isinstance(tokenizer, PreTrainedTokenizerBase), "the classifier's tokenizer"
    )


def _expect(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        kind = "None" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{name}: expected {expected}, found {kind}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
