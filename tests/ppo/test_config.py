"""`PPOConfig` takes values of the types of its fields, whoever builds it."""

import dataclasses
import re
import typing
from typing import Any

import numpy
import pytest

from pipeline import PPOConfig

HINTS = typing.get_type_hints(PPOConfig)
OWN = [name for name in vars(PPOConfig)["__annotations__"] if name not in ("RESERVED", "TRL_NAMES")]
WRONG = {int: ["5", 2.5, True, None, [1]], float: ["0.5", True, [0.5], float("nan"), float("inf")]}


def make(**changes: Any) -> PPOConfig:
    return PPOConfig("out", report_to="none", use_cpu=True, **changes)


@pytest.mark.parametrize("name", OWN)
def test_no_field_takes_a_value_of_another_type(name: str) -> None:
    hint = next((kind for kind in (int, float) if HINTS[name] in (kind, kind | None)), None)
    wrong = [3, True, []] if hint is None else WRONG[hint]
    for value in wrong:
        if value is None and HINTS[name] == int | None:
            continue
        with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))}: expected "):
            make(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rollouts": "5"}, "num_rollouts='5': expected a whole number"),
        ({"clip_value": "none"}, "clip_value='none': expected a number or None"),
        ({"output_dir": 3}, "output_dir=3: expected text or None"),
        ({"learning_rate": -1e-5}, "learning_rate=-1e-05: expected 0 or more"),
        ({"logging_steps": 0}, "logging_steps=0: expected more than 0, at most 1,000,000,000"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0: expected 0 or more, less than 1"),
        ({"seed": "1"}, "seed='1': expected a whole number"),
        ({"optim": "adam"}, "optim='adam': expected one of adamw_torch, "),
        ({"log_level": "loud"}, "log_level='loud': expected one of detail, "),
        ({"report_to": 3}, "report_to=3: expected text or a list or None"),
        ({"accelerator_config": 3}, "accelerator_config=3: expected a mapping of keys"),
    ],
)
def test_a_wrong_value_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        PPOConfig(**{"output_dir": "out", "report_to": "none", "use_cpu": True} | arguments)


def test_right_values_are_kept_in_copies_too() -> None:
    changes: dict[str, Any] = {"kl_target": 6, "gamma": 1, "num_rollouts": numpy.int64(7), "clip_value": None}
    args = make(
        lr_scheduler_type="cosine", save_steps=0.5, accelerator_config={"split_batches": True}, **changes
    )
    assert {name: getattr(args, name) for name in changes} == changes
    assert dataclasses.replace(args).to_dict() == args.to_dict()
