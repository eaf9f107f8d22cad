"""Each value under `training:` and `lora:` is built, or refused in one line before a model is loaded."""

import dataclasses
import math
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import RewardConfig, SFTConfig

from pipeline import config
from pipeline.errors import UserError
from pipeline.ppo import stage as ppo
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.trl_trainers import ARGUMENTS
from pipeline.reward import stage as reward
from pipeline.sft import stage as sft
from pipeline.training.ranges import RANGES, check_ranges

STAGES: dict[str, tuple[Any, type, dict[str, Any], type]] = {
    "sft": (sft, config.SFTStage, {"model": "a"}, SFTConfig),
    "reward": (reward, config.RewardStage, {"model": "a"}, RewardConfig),
    "ppo": (ppo, config.PPOStage, {"reward": "math:sqrt"}, PPOConfig),
    "rloo": (ppo, config.PPOStage, {"reward": "math:sqrt", "algorithm": "rloo"}, ARGUMENTS["rloo"]),
    "grpo": (ppo, config.PPOStage, {"reward": "math:sqrt", "algorithm": "grpo"}, ARGUMENTS["grpo"]),
}
COMMON = {field.name for field in dataclasses.fields(TrainingArguments)}
VALUES = (-1, 0, -0.5, 0.5, 1e30, "x", "", [], {}, {"a": 1}, True, False, None)


def check(name: str, section: str, **values: Any) -> None:
    module, cls, common, _ = STAGES[name]
    module.check(cls(run="x", **common, **{section: values}))


def refused(name: str, section: str, **values: Any) -> str:
    with pytest.raises(UserError) as error:
        check(name, section, **values)
    return str(error.value)


def sections(name: str) -> list[tuple[str, str]]:
    """Section and key of what a stage takes; what all take is in `sft` alone."""
    keys = [field.name for field in dataclasses.fields(STAGES[name][3]) if field.init]
    own = [("training", key) for key in keys if name == "sft" or key not in COMMON]
    return own + [("lora", field.name) for field in dataclasses.fields(LoraConfig) if name == "sft"]


@pytest.mark.parametrize("name", STAGES)
def test_each_key_with_each_value_is_built_or_one_line(name: str) -> None:
    for section, key in sections(name):
        accepted = 0
        for value in VALUES:
            try:
                check(name, section, **{key: value})
                accepted += 1
            except UserError as error:
                message = str(error)
                assert key in message or section in message, message
                assert "\n" not in message
        assert accepted < len(VALUES), key


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_nan_or_infinite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"training\.learning_rate: found -?(nan|inf)"):
        check(name, "training", learning_rate=value)


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("learning_rate", (-1, -1e-9), "0 or more"),
        ("weight_decay", (-1,), "0 or more"),
        ("max_grad_norm", (-1,), "0 or more"),
        ("dataloader_num_workers", (-1,), "0 or more"),
        ("adam_beta1", (-0.1, 1, 1e30), "0 or more, less than 1"),
        ("adam_beta2", (-0.1, 1, 1e30), "0 or more, less than 1"),
        ("adam_epsilon", (0, -1), "more than 0"),
        ("label_smoothing_factor", (-0.1, 1), "0 or more, less than 1"),
        ("logging_steps", (0, -0.5), "more than 0, at most 1,000,000,000"),
        ("save_steps", (0, -0.5, 1e30), "more than 0, at most 1,000,000,000"),
        ("eval_steps", (0, -2), "more than 0, at most 1,000,000,000"),
        ("num_train_epochs", (0, -1, 1e30), "more than 0, at most 1,000,000,000"),
        ("warmup_steps", (-1, 1e30), "0 or more, at most 1,000,000,000"),
        ("max_steps", (0, -2), "1 or more, at most 1,000,000,000"),
        ("save_total_limit", (0, -1), "1 or more, at most 1,000,000,000"),
        ("dataset_num_proc", (0, -1), "1 or more, at most 1,000,000,000"),
        ("per_device_train_batch_size", (0, -1), "1 or more, at most 1,000,000,000"),
        ("per_device_eval_batch_size", (0, -1), "1 or more, at most 1,000,000,000"),
        ("gradient_accumulation_steps", (0, -1), "1 or more, at most 1,000,000,000"),
        ("report_to", (5,), "expected text"),
        ("learning_rate", (True,), "a number, not true or false"),
        ("max_steps", (False,), "a number, not true or false"),
        ("lr_scheduler_kwargs", ("x",), "a mapping of keys"),
        ("loss_type", ("x",), "one of nll, dft"),
        ("log_level", ("x",), "one of detail, debug, info, warning, error, critical, passive"),
        ("train_sampling_strategy", ("x",), "one of random, sequential, group_by_length"),
    ],
)
def test_values_out_of_range_are_told_with_the_range(
    key: str, values: tuple[Any, ...], expected: str
) -> None:
    for value in values:
        message = refused("sft", "training", **{key: value})
        assert message.startswith(f"sft: training.{key}=")
        assert expected in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"r": 0}, "lora.r=0: expected 1 or more"),
        ({"lora_alpha": 0}, "lora.lora_alpha=0: expected 1 or more"),
        ({"lora_dropout": 2}, "lora.lora_dropout=2.0: expected 0 or more, less than 1"),
        ({"r": True}, "lora.r=True: expected a number"),
        ({"rank_pattern": "x"}, "lora.rank_pattern='x'"),
        ({"inference_mode": True}, "lora.inference_mode is set by the stage; remove it"),
        ({"base_model_name_or_path": "x"}, "lora.base_model_name_or_path is set by the stage"),
    ],
)
def test_values_of_an_adapter_are_checked_alike(values: dict[str, Any], expected: str) -> None:
    assert expected in refused("sft", "lora", **values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr_scheduler_type": "x"}, "is not a valid SchedulerType"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"nope": 1}}, "nope"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "training: "),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
        ({"optim": "x"}, "is not a valid OptimizerNames"),
        ({"optim": "galore_adamw", "optim_target_modules": ["a"]}, "galore"),
        ({"optim_args": "x"}, "training: "),
        ({"dataloader_persistent_workers": True}, "persistent_workers"),
        ({"dataloader_multiprocessing_context": "fork"}, "multiprocessing_context"),
        ({"gradient_checkpointing_kwargs": {"a": 1}}, "gradient_checkpointing_kwargs.a: no such key"),
        ({"save_strategy": "best"}, "save_strategy: best needs training.metric_for_best_model"),
        ({"use_liger_kernel": True}, "use_liger_kernel needs liger-kernel, which is not installed here"),
    ],
)
def test_what_the_trainer_could_not_build_is_refused(values: dict[str, Any], expected: str) -> None:
    assert expected in refused("sft", "training", **values)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("grpo", {"temperature": 0}),
        ("rloo", {"top_p": 1.5}),
        ("grpo", {"num_iterations": 0}),
        ("rloo", {"num_generations": 0}),
        ("grpo", {"scale_rewards": "x"}),
        ("rloo", {"generation_kwargs": {"nope": 1}}),
        ("grpo", {"use_vllm": True}),
        ("ppo", {"temperature": 0}),
        ("ppo", {"gamma": 1.5}),
        ("ppo", {"num_rollouts": 0}),
        ("ppo", {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}),
    ],
)
def test_the_algorithms_own_values_are_checked(name: str, values: dict[str, Any]) -> None:
    message = refused(name, "training", **values)
    assert message.startswith("ppo: training")
    assert next(iter(values)) in message


@pytest.mark.parametrize("key", RANGES)
def test_every_listed_key_is_one_of_the_libraries(key: str) -> None:
    """Else a name that a library changes would lose its range."""
    classes = [*(cls for *_, cls in STAGES.values()), LoraConfig]
    assert any(key in {field.name for field in dataclasses.fields(cls)} for cls in classes)


def test_a_number_in_a_list_is_checked_too() -> None:
    check_ranges("lora", {"layers_to_transform": [0, -1]}, LoraConfig)
    with pytest.raises(UserError, match="expected a finite number"):
        check_ranges("lora", {"layers_to_transform": [math.nan]}, LoraConfig)
