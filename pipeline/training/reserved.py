"""Keys under `training:` that are refused: the stage sets them, nothing reads them, or they break a promise.

The promises: a stage ends, an interrupted one resumes with the same weights, and what is published is what
was trained.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments

from pipeline.config import nearest
from pipeline.errors import UserError

HUB_KEYS = (
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
    "log_completions_hub_repo",
)

# Arguments that the stage sets itself, with the key to set instead. A value "nothing: reason" means that
# there is no such key. An arguments class may have a RESERVED of its own with more.
RESERVED = {
    "output_dir": "run",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "precision",
    "full_determinism": "seed",
    "resume_from_checkpoint": "nothing: an interrupted run resumes by itself",
    "max_length": "max_length",
    "local_rank": "nothing: the launch sets it",
} | dict.fromkeys(HUB_KEYS, "nothing: rlhf push uploads an artifact with its card")

LAUNCH = "what shards weights is the launch: accelerate launch --config_file configs/accelerate/NAME.yaml"
FLAGS = "a stage always trains, and evaluates with eval_strategy"
ROUNDED = "it would round the weights that are published; set precision"
METRICS = "an evaluation has the metrics of its stage, over all rows"

# Arguments with which no stage keeps its promises, with the reason. Their default values are accepted.
UNSUPPORTED = {
    "save_only_model": "an interrupted run could not resume from its checkpoints",
    "ignore_data_skip": "a resumed run would train on other rows",
    "restore_callback_states_from_checkpoint": "an interrupted run resumes by itself",
    "enable_jit_checkpoint": "an interrupted run saves a checkpoint by itself",
    "auto_find_batch_size": "a resumed run would have other batches; set per_device_train_batch_size",
    "accelerator_config": "it changes the batches of a rank, and a resumed run would train on other rows",
    "deepspeed": LAUNCH,
    "fsdp": LAUNCH,
    "fsdp_config": LAUNCH,
    "parallelism_config": LAUNCH,
    "do_train": FLAGS,
    "do_eval": FLAGS,
    "do_predict": FLAGS,
    "bf16_full_eval": ROUNDED,
    "fp16_full_eval": ROUNDED,
    "batch_eval_metrics": METRICS,
    "eval_do_concat_batches": METRICS,
    "include_for_metrics": METRICS,
    "prediction_loss_only": METRICS,
    "label_names": METRICS,
    "debug": "its hooks fail on the boolean masks of a model",
    "skip_memory_metrics": "log.jsonl would differ from launch to launch; rlhf doctor estimates memory",
}
# Arguments of peft.LoraConfig that are refused with any value.
RESERVED_LORA = (
    "task_type",
    "revision",
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "runtime_config",
    "megatron_config",
    "megatron_core",
)


def check_reserved(
    stage: str, training: dict[str, Any], cls: type[TrainingArguments], unsupported: dict[str, str]
) -> None:
    """Raise `UserError` for a key that the stage sets itself, or an unsupported one with a value of its own.

    `unsupported` are those of the stage, with reasons, beside those of all stages.
    """
    reserved = RESERVED | getattr(cls, "RESERVED", {})
    reasons = UNSUPPORTED | unsupported
    defaults = {field.name: default_of(field) for field in dataclasses.fields(cls)}
    for key, value in training.items():
        if key in reserved:
            raise UserError(f"{stage}: training.{key} is set by the stage; {_instructions(reserved[key])}")
        if key in reasons and value != defaults.get(key):
            raise UserError(f"{stage}: training.{key}: {reasons[key]}; remove it")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default value of a dataclass's field; None if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def suggest_name(name: str, known: Iterable[str], counterparts: dict[str, str]) -> str:
    """Return the end of a message about an unknown name: what it is called here, or the nearest known name.

    `counterparts` are names of TRL, with values as in `RESERVED`.
    """
    if name not in counterparts:
        return nearest(name, known)
    reason = counterparts[name].removeprefix("nothing: ")
    if reason == counterparts[name]:
        return f"; TRL's {name} is {reason} here"
    return f"; remove it: {reason}"


def _instructions(instead: str) -> str:
    reason = instead.removeprefix("nothing: ")
    return f"set {instead!r} instead" if reason == instead else f"remove it: {reason}"
