"""The `training:` and `lora:` sections: checked, then built into the libraries' own classes.

`training:` holds the keyword arguments of the trainer's own arguments class. Unknown names and wrong types are refused before anything
is built, because that class would accept some of them.
"""

import dataclasses
import os
import typing
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from pydantic import TypeAdapter, ValidationError
from transformers import IntervalStrategy, TrainingArguments
from transformers.utils import logging as transformers_logging

from pipeline.artifacts.files import read_json
from pipeline.config import EvaluateStage, TrainedStage, nearest
from pipeline.distributed.launch import sharding_type, unsupported_sharding
from pipeline.distributed.processes import world_size
from pipeline.distributed.sharding import disable_zero3_init
from pipeline.errors import UserError
from pipeline.training import trackers
from pipeline.training.checkpoints import LAUNCH_FILE

HUB = (
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_token",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
)


# Set by the stage itself -> what to set instead.
RESERVED = {
    "output_dir": "run", "seed": "seed", "data_seed": "seed", "bf16": "precision", "fp16": "precision", "use_cpu": "precision",
    "full_determinism": "seed", "resume_from_checkpoint": "nothing: an interrupted run resumes by itself", "max_length": "max_length",
}  # fmt: skip

RESERVED |= dict.fromkeys(HUB, "nothing: rlhf push takes to the hub what a stage has made, with its card")


def check_training(config: TrainedStage, arguments_class: type[TrainingArguments]) -> None:
    """Refuse names, types and values in `training:` and `lora:` that their classes do, or that the stage sets itself."""
    for key in config.training:
        if instead := (RESERVED | getattr(arguments_class, "RESERVED", {})).get(key):
            raise UserError(f"{config.stage}: training.{key} is set by the stage; set {instead!r} instead")
    check_quantization(config.stage, config.quantization)
    if problem := unsupported_sharding(os.environ, getattr(config, "algorithm", "ppo")):
        raise UserError(f"{config.stage}: was launched with {problem}")
    trackers.check_trackers(config.stage, config.training)
    _check_section(f"{config.stage}: training", config.training, arguments_class)
    if config.lora is not None:
        for key in {"task_type", "revision"} & config.lora.keys():
            raise UserError(f"{config.stage}: lora.{key} is set by the stage; remove it")
        _check_section(f"{config.stage}: lora", config.lora, LoraConfig)
    build_arguments(config, arguments_class, Path("unused"))


def check_quantization(stage: str, quantization: str) -> None:
    """Raises `UserError` where this machine cannot quantize."""
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise UserError(
            f"{stage}: quantization: {quantization} needs bitsandbytes, which is not installed here; "
            "pip install bitsandbytes, or set quantization: none"
        )


def build_lora_config(
    config: TrainedStage, task: TaskType, revision: str | None = None, heads: Sequence[str] = ()
) -> LoraConfig | None:
    """The `lora:` section as PEFT's own class; `revision` is the base's commit, which the adapter is worth nothing without. `heads` are
    modules that are trained whole, and so get no adapter: PEFT knows some names, not DistilBERT's `pre_classifier`."""
    if config.lora is None:
        return None
    built = LoraConfig(task_type=task, revision=revision, **_typed_section(config.lora, LoraConfig))
    if heads:
        built.modules_to_save = list(dict.fromkeys([*heads, *(built.modules_to_save or [])]))
        built.exclude_modules = built.exclude_modules or rf"(.*\.)?({'|'.join(heads)})(\..*)?"
    return built


def build_arguments(config: TrainedStage, cls: type[TrainingArguments], work: Path, **more: Any) -> Any:
    """`cls` with the section, the seed and the precision of `config`; checkpoints go to `work`. `more` are the stage's defaults.

    Comes before any model is loaded: it gives this process its device.
    """
    precision = resolve_precision(config.precision)
    fixed = {
        "output_dir": str(work), "seed": config.seed, "bf16": precision == "bf16", "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip
    defaults = {
        "report_to": "none", "run_name": f"{config.run}-{config.stage}", "save_total_limit": 2, "gradient_checkpointing": False,
        "logging_steps": 10, "dataloader_pin_memory": False, "disable_tqdm": not transformers_logging.is_progress_bar_enabled(), **more,
    }  # fmt: skip
    given = defaults | _typed_section(config.training, cls) | fixed
    given |= _keep_step_size(config, cls, given, read_json(work / LAUNCH_FILE))
    try:
        built = cls(**given)
    except (ValueError, TypeError) as error:
        raise UserError(f"{config.stage}: training: {' '.join(str(error).split())}") from None
    disable_zero3_init(built)
    if built.mixed_precision != (expected := precision.replace("fp32", "no")):
        raise UserError(
            f"{config.stage}: precision is {precision}, and accelerate launch was told mixed_precision: {built.mixed_precision}; "
            f"set mixed_precision: '{expected}' in its file, and 'precision' in the config"
        )
    if (
        built.n_gpu > 1
    ):  # the Trainer would split each batch over them by nn.DataParallel, which no stage here reckons with
        raise UserError(
            f"{config.stage}: {built.n_gpu} GPUs are visible to one process; start one process for each with "
            f"'accelerate launch -m pipeline {config.stage} …', or choose one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    return built


def _keep_step_size(
    config: TrainedStage, cls: type[TrainingArguments], given: dict[str, Any], begun: dict[str, Any]
) -> dict[str, int]:
    """What makes a step of the rows that it had when the run was `begun` by another number of processes; {} by the same number.

    Raises `UserError` where these cannot share it, or cannot read what those have saved.
    """
    if not begun or (begun["processes"], begun["sharded_by"]) == (
        here := world_size(),
        sharding_type(os.environ),
    ):
        return {}
    if begun["sharded_by"] != sharding_type(os.environ):
        raise UserError(
            f"{config.stage}: was begun with weights sharded by {begun['sharded_by']}, and is launched with {sharding_type(os.environ)}; "
            "launch it as it was, or add --force to start afresh"
        )
    most, parts = (
        given.get(name, getattr(cls, name))
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    rows = most * parts * begun["processes"]
    if rows % here:
        raise UserError(
            f"{config.stage}: was begun by {begun['processes']} processes, with steps of {rows} rows, which {here} cannot share evenly; "
            f"start a number that divides {rows}, or add --force to start afresh"
        )
    size = max(size for size in range(1, most + 1) if rows // here % size == 0)
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // here // size}


def require_eval_rows(args: TrainingArguments, rows: Dataset | None) -> Dataset | None:
    """`rows`; where there are none the trainer is told not to evaluate, or it would refuse to start."""
    if rows is not None and len(rows):
        return rows
    args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    return None


def resolve_precision(precision: str) -> str:
    """`auto` is bf16 on a GPU that has it, else fp32: the mixed precisions need hardware that TRL's defaults take for granted."""
    if precision == "auto":
        return (
            "bf16"
            if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            else "fp32"
        )
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision: fp16 needs a GPU, and none is visible; use fp32 or auto")
    return precision


def weight_precision(config: TrainedStage) -> str:
    """The dtype weights are loaded in: fp32 where they are trained, the compute precision where they are frozen under LoRA."""
    return "fp32" if config.lora is None else resolve_precision(config.precision)


def load_options(config: TrainedStage | EvaluateStage, revision: str | None) -> dict[str, Any]:
    """Return the loaders' keyword arguments: revision, trust_remote_code, quantization and precision.

    `revision` is the branch, tag or commit of a model on the hub. The precision is `weight_precision` if the
    stage trains, else the precision of the computation.
    """
    if isinstance(config, TrainedStage):
        precision = weight_precision(config)
    else:
        precision = resolve_precision(config.precision)
    return {
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
        "quantization": config.quantization,
        "precision": precision,
    }


def _check_section(where: str, section: dict[str, Any], cls: type) -> None:
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for key in section:
        if key not in known:
            raise UserError(f"{where}.{key}: {cls.__name__} has no such key{nearest(key, known)}")
    _typed_section(section, cls, where)


def _typed_section(section: dict[str, Any], cls: type, where: str = "training") -> dict[str, Any]:
    """The section's values as their field's type (`5e-5` in YAML is a string to some readers)."""
    hints = _type_hints(cls)
    result = {}
    for key, value in section.items():
        try:
            result[key] = _typed(hints[key], value)
        except ValidationError as error:
            raise UserError(f"{where}.{key}={value!r}: {error.errors()[0]['msg'].lower()}") from None
        except Exception:  # a hint pydantic has no schema for: the class itself will judge
            result[key] = value
    return result


def _typed(hint: Any, value: Any) -> Any:
    adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value)
    except ValidationError:
        if value is False:  # a bare `no` in YAML, where a strategy may be "no"
            return adapter.validate_python("no")
        raise


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except Exception:  # forward references of optional packages
        return {field.name: Any for field in dataclasses.fields(cls)}
