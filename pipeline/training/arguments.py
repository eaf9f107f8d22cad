"""The `training:` and `lora:` sections: checked, then built into the libraries' own classes.

`training:` contains keyword arguments of the trainer's own arguments class. Unknown names and wrong types are
refused before anything is built, because that class would accept some of them.
"""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from pydantic import TypeAdapter, ValidationError
from transformers import IntervalStrategy, TrainingArguments
from transformers.utils import logging as transformers_logging

from pipeline.config import EvaluateStage, TrainedStage
from pipeline.config.values import explain_text, shorten
from pipeline.distributed.launch import sharding_type, unsupported_sharding
from pipeline.distributed.processes import world_size
from pipeline.distributed.sharding import disable_zero3_init
from pipeline.errors import UserError, one_line
from pipeline.models.adapters import unsupported_setting
from pipeline.training import trackers
from pipeline.training.checkpoints import read_launch
from pipeline.training.field_types import type_hints
from pipeline.training.ranges import check_ranges
from pipeline.training.rehearsal import rehearse
from pipeline.training.reserved import RESERVED_LORA, check_reserved, suggest_name


def check_training(
    config: TrainedStage,
    arguments_class: type[TrainingArguments],
    unsupported: dict[str, str] | None = None,
) -> None:
    """Check the `training:` and `lora:` sections, the launch and the trackers.

    `unsupported` are arguments that the stage does not read, or that break what it promises, with the reason.
    Raises `UserError` for names, types, values and combinations that would fail or be ignored later, and for
    arguments that the stage sets itself.
    """
    check_reserved(config.stage, config.training, arguments_class, unsupported or {})
    check_quantization(config.stage, config.quantization)
    if problem := unsupported_sharding(os.environ, getattr(config, "algorithm", "ppo")):
        raise UserError(f"{config.stage}: {problem}")
    _check_section(f"{config.stage}: training", config.training, arguments_class)
    trackers.check_trackers(config.stage, config.training)
    check_lora(config)
    rehearse(config.stage, build_arguments(config, arguments_class, Path("unused")))


def check_lora(config: TrainedStage, section: str = "lora") -> None:
    """Raise `UserError` for values that PEFT refuses, and for settings with which no stage trains.

    `section` is the name of the section in messages.
    """
    if config.lora is None:
        return
    for key in [key for key in RESERVED_LORA if key in config.lora]:
        raise UserError(f"{config.stage}: {section}.{key} is set by the stage; remove it")
    _check_section(f"{config.stage}: {section}", config.lora, LoraConfig)
    try:
        lora = build_lora_config(config, TaskType.CAUSAL_LM)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{config.stage}: {section}: {one_line(error)}") from None
    if lora is not None and (problem := unsupported_setting(lora)):
        raise UserError(f"{config.stage}: {section}.{problem}; remove it")


def check_quantization(stage: str, quantization: str) -> None:
    """Raise `UserError` if this machine cannot quantize."""
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise UserError(
            f"{stage}: quantization: {quantization} needs bitsandbytes, which is not installed here; "
            "pip install bitsandbytes, or set quantization: none"
        )


def build_lora_config(
    config: TrainedStage, task: TaskType, revision: str | None = None, heads: Sequence[str] = ()
) -> LoraConfig | None:
    """Build PEFT's own class from the `lora:` section; None without a section.

    `revision` is the commit of the base, without which the adapter is useless. `heads` are modules that are
    fully trained and get no adapter: PEFT knows some names, but not DistilBERT's `pre_classifier`.
    """
    if config.lora is None:
        return None
    lora = LoraConfig(task_type=task, revision=revision, **_convert_section(config.lora, LoraConfig))
    if heads:
        lora.modules_to_save = list(dict.fromkeys([*heads, *(lora.modules_to_save or [])]))
        lora.exclude_modules = lora.exclude_modules or rf"(.*\.)?({'|'.join(heads)})(\..*)?"
    return lora


def build_arguments(
    config: TrainedStage, arguments_class: type[TrainingArguments], work: Path, **defaults: Any
) -> Any:
    """Build `arguments_class` from the `training:` section, the seed and the precision of `config`.

    Checkpoints are written to `work`. `defaults` are the stage's own; the section overrides them. Call this
    before loading a model, because it assigns the device to this process. Raises `UserError` for values that
    the class refuses, for a launch with another precision or with several GPUs in one process, and if the
    checkpoints in `work` cannot be resumed in this launch.
    """
    precision = resolve_precision(config.precision)
    kwargs = _default_arguments(config) | defaults
    kwargs |= _convert_section(config.training, arguments_class)
    kwargs |= {
        "output_dir": str(work),
        "seed": config.seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not torch.cuda.is_available(),
    }
    kwargs |= _keep_step_size(config, arguments_class, kwargs, read_launch(work))
    try:
        args = arguments_class(**kwargs)
    except (ValueError, TypeError) as error:
        raise UserError(f"{config.stage}: training: {one_line(error)}") from None
    disable_zero3_init(args)
    _check_launch(config, args, precision)
    return args


def _default_arguments(config: TrainedStage) -> dict[str, Any]:
    return {
        "report_to": "none",
        "run_name": f"{config.run}-{config.stage}",
        "save_total_limit": 2,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "dataloader_pin_memory": False,
        "disable_tqdm": not transformers_logging.is_progress_bar_enabled(),
    }


def _check_launch(config: TrainedStage, args: TrainingArguments, precision: str) -> None:
    """Raise `UserError` if the launch has another precision, or several GPUs in one process."""
    expected = precision.replace("fp32", "no")
    if args.mixed_precision != expected:
        raise UserError(
            f"{config.stage}: precision is {precision}, but accelerate launch has mixed_precision: "
            f"{args.mixed_precision}; set mixed_precision: '{expected}' in its file, or 'precision' in the "
            "config"
        )
    # The Trainer would split each batch over the GPUs with nn.DataParallel, which no stage supports.
    if args.n_gpu > 1:
        raise UserError(
            f"{config.stage}: {args.n_gpu} GPUs are visible to one process; start one process for each with "
            f"'accelerate launch -m pipeline {config.stage} …', or choose one GPU with CUDA_VISIBLE_DEVICES=0"
        )


def _keep_step_size(
    config: TrainedStage,
    arguments_class: type[TrainingArguments],
    kwargs: dict[str, Any],
    launch: dict[str, Any],
) -> dict[str, int]:
    """Return the arguments that keep the rows per step if a run resumes with another number of processes.

    `launch` is how the run was started, as `KeepCheckpoints` wrote it, or {}. The result is {} if nothing
    changed. Raises `UserError` if these processes cannot share a step evenly, or cannot read the sharded
    checkpoint.
    """
    processes, sharding = world_size(), sharding_type(os.environ)
    if not launch or (launch["processes"], launch["sharded_by"]) == (processes, sharding):
        return {}
    if launch["sharded_by"] != sharding:
        raise UserError(
            f"{config.stage}: was started with weights sharded by {launch['sharded_by']}, but this launch "
            f"has weights sharded by {sharding}; launch it as before, or add --force to start over"
        )

    max_batch, accumulation = (
        kwargs.get(name, getattr(arguments_class, name))
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    rows = max_batch * accumulation * launch["processes"]
    if rows % processes:
        raise UserError(
            f"{config.stage}: was started by {launch['processes']} processes with {rows} rows per step, "
            f"which {processes} processes cannot share evenly; start a number of processes that "
            f"divides {rows}, or add --force to start over"
        )
    local_rows = rows // processes
    batch = max(size for size in range(1, max_batch + 1) if local_rows % size == 0)
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": local_rows // batch}


def require_batch(where: str, args: TrainingArguments, rows: Dataset) -> Dataset:
    """Return `rows`. Raises `UserError` if `dataloader_drop_last` would drop the only batch."""
    needed = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(rows) < needed:
        raise UserError(
            f"{where}: has {len(rows)} rows, and training.dataloader_drop_last drops a batch of fewer than "
            f"{needed}; remove it, or lower training.per_device_train_batch_size"
        )
    return rows


def require_eval_rows(args: TrainingArguments, rows: Dataset | None) -> Dataset | None:
    """Return `rows`, or None if there are none.

    Evaluation is then disabled in `args`, because a trainer that evaluates does not start without rows.
    """
    if rows is not None and len(rows):
        return rows
    args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    return None


def resolve_precision(precision: str) -> str:
    """Return the precision of the computation; `auto` is bf16 on a GPU that supports it, else fp32.

    The default is not TRL's, because mixed precision needs hardware that TRL takes for granted. Raises
    `UserError` for fp16 without a GPU.
    """
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision: fp16 needs a GPU, and none is visible; use fp32 or auto")
    return precision


def weight_precision(config: TrainedStage) -> str:
    """Return the dtype in which weights are loaded.

    It is fp32 if they are trained, and the precision of the computation if they are frozen under LoRA.
    """
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


def _check_section(prefix: str, section: dict[str, Any], cls: type) -> None:
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    for key in section:
        if key not in known:
            hint = suggest_name(key, known, getattr(cls, "TRL_NAMES", {}))
            raise UserError(f"{prefix}.{key}: {cls.__name__} has no such key{hint}")
    check_ranges(prefix, _convert_section(section, cls, prefix), cls)


def _convert_section(section: dict[str, Any], cls: type, prefix: str = "training") -> dict[str, Any]:
    """Convert the section's values to the types of their fields: some readers take `5e-5` as a string.

    Raises `UserError` for a value that does not convert.
    """
    hints = type_hints(cls)
    converted = {}
    for key, value in section.items():
        try:
            converted[key] = _convert(hints[key], value, key.endswith("_strategy"))
        except ValidationError as error:
            first = error.errors()[0]
            problem = explain_text(f"{prefix}.{key}", value) if first["type"] == "string_type" else ""
            raise UserError(problem or f"{prefix}.{key}={shorten(value)}: {first['msg'].lower()}") from None
        except Exception:  # pydantic has no schema for the hint; the class itself checks the value
            converted[key] = value
        if isinstance(value, bool) and type(converted[key]) in (int, float):
            raise UserError(f"{prefix}.{key}={value}: expected a number, not true or false")
    return converted


def _convert(hint: Any, value: Any, may_be_no: bool = True) -> Any:
    """Return `value` as the type of a field; with `may_be_no`, false is the text that YAML reads as false.

    The text "none" is None if the field is an optional number.
    """
    adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value)
    except ValidationError:
        if value is False and may_be_no:  # a bare `no`, where a strategy may be "no"
            return adapter.validate_python("no")
        if value == "none":  # of a number, where errors say "or none"; a text stays a text
            with suppress(ValidationError):
                return adapter.validate_python(None)
        raise
