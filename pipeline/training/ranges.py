"""Ranges of the numbers under `training:` and `lora:`, and the texts between which some keys choose.

The libraries' classes check few of them. A value out of range fails after the model is loaded, or is ignored.
A number that is not listed here is 0 or more; `PPOConfig` checks its own.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from pipeline.config.values import shorten
from pipeline.errors import UserError

Interval = tuple[str, float, float, str]  # as it is written: ("[", 0, 1, ")") includes 0 and excludes 1

NOT_NEGATIVE: Interval = ("[", 0, math.inf, ")")
ANY: Interval = ("(", -math.inf, math.inf, ")")
POSITIVE: Interval = ("(", 0, math.inf, ")")
MOST = 1_000_000_000  # of steps, rows and the like
COUNT: Interval = ("[", 1, MOST, "]")
STEPS: Interval = ("(", 0, MOST, "]")  # below 1 a fraction of the run
FROM_0_BELOW_1: Interval = ("[", 0, 1, ")")
FROM_0_TO_1: Interval = ("[", 0, 1, "]")
ABOVE_0_TO_1: Interval = ("(", 0, 1, "]")
PORT: Interval = ("[", 0, 65535, "]")


def _each(interval: Interval, names: str) -> dict[str, Interval]:
    return dict.fromkeys(names.split(), interval)


RANGES: dict[str, Interval] = (
    _each(
        COUNT,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "max_steps save_total_limit eval_accumulation_steps dataset_num_proc ddp_bucket_cap_mb "
        "ddp_timeout dataloader_prefetch_factor torch_empty_cache_steps pad_to_multiple_of "
        "num_generations num_generations_eval max_completion_length generation_batch_size "
        "steps_per_generation num_iterations ref_model_sync_steps num_completions_to_print "
        "vllm_max_model_length vllm_tensor_parallel_size r lora_alpha qalora_group_size",
    )
    | _each(STEPS, "logging_steps eval_steps save_steps num_train_epochs")
    | _each(("[", 0, MOST, "]"), "warmup_steps eval_delay")
    | _each(FROM_0_BELOW_1, "adam_beta1 adam_beta2 lora_dropout label_smoothing_factor")
    | _each(FROM_0_TO_1, "min_p ref_model_mixup_alpha top_entropy_quantile")
    | _each(ABOVE_0_TO_1, "top_p vllm_gpu_memory_utilization")
    | _each(
        POSITIVE,
        "adam_epsilon neftune_noise_alpha temperature repetition_penalty sapo_temperature_neg "
        "sapo_temperature_pos vespo_k_pos vespo_k_neg vespo_lambda_pos vespo_lambda_neg "
        "vllm_server_timeout delta",
    )
    | _each(("[", 0, 1024, "]"), "dataloader_num_workers")
    | _each(PORT, "vllm_server_port vllm_group_port")
    | _each(ANY, "missing_eos_penalty entropy_coef_min layers_to_transform")
)
UNLIMITED = {"max_steps": -1}  # the value that stands for no limit

CHOICES: dict[str, tuple[str, ...]] = {
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("server", "colocate"),
    "vllm_model_impl": ("vllm", "transformers"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
LOSS_TYPES = {
    "SFTConfig": ("nll", "dft"),
    "GRPOConfig": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
}


def check_ranges(prefix: str, section: dict[str, Any], cls: type) -> None:
    """Raise `UserError` for a value of `section` that is out of range; its type was checked before.

    `cls` is the class of the libraries that takes the section. Numbers inside a mapping, such as those of
    `rank_pattern`, are only checked for being finite.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in section.items():
        name = f"{prefix}.{key}={shorten(value)}"
        is_mapping = key.endswith(("_kwargs", "_config", "rank_pattern", "alpha_pattern"))
        if is_mapping and isinstance(value, str | int | float | list):
            raise UserError(f"{name}: expected a mapping of keys")
        choices = _choices(key, cls) or fields[key].metadata.get("choices")
        if choices and isinstance(value, str) and value not in choices:
            raise UserError(f"{name}: expected one of {', '.join(choices)}")
        interval = RANGES.get(key, NOT_NEGATIVE)
        for number in _numbers(value):
            if not math.isfinite(number):
                raise UserError(f"{name}: expected a finite number")
            if number != UNLIMITED.get(key) and not _contains(interval, number):
                raise UserError(f"{name}: expected {_describe(interval)}")


def _choices(key: str, cls: type) -> tuple[str, ...]:
    if key == "loss_type":
        return next((LOSS_TYPES[base.__name__] for base in cls.__mro__ if base.__name__ in LOSS_TYPES), ())
    return CHOICES.get(key, ())


def _numbers(value: Any) -> Iterable[float]:
    """Return the numbers of a scalar or a list; true and false are none."""
    values = value if isinstance(value, list | tuple) else [value]
    return [item for item in values if isinstance(item, int | float) and not isinstance(item, bool)]


def _contains(interval: Interval, number: float) -> bool:
    opening, low, high, closing = interval
    above = number > low or (opening == "[" and number == low)
    return above and (number < high or (closing == "]" and number == high))


def _describe(interval: Interval) -> str:
    opening, low, high, closing = interval
    lower = f"{low:,} or more" if opening == "[" else f"more than {low:,}"
    if high == math.inf:
        return lower
    return f"{lower}, {'at most' if closing == ']' else 'less than'} {high:,}"
