"""Build what the Trainer will build from its arguments, on one weight and one row, before a model is loaded.

The libraries check many values only there: the optimizer's, the schedule's and the data loader's.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler

from pipeline.errors import UserError, one_line

PACKAGES = {"use_liger_kernel": ("liger_kernel", "liger-kernel"), "use_vllm": ("vllm", "vllm")}
# Arguments of activation_checkpointing_enable: its own, and those of torch.utils.checkpoint.checkpoint.
CHECKPOINTING = {
    "every_n_layers",
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
}


def rehearse(stage: str, args: TrainingArguments) -> None:
    """Raise `UserError` for arguments from which the Trainer could not build what it needs."""
    for key, (module, package) in PACKAGES.items():
        if getattr(args, key, False) and find_spec(module) is None:
            raise UserError(
                f"{stage}: training.{key} needs {package}, which is not installed here; remove it"
            )
    if getattr(args, "activation_offloading", False) and not torch.accelerator.is_available():
        raise UserError(
            f"{stage}: training.activation_offloading needs a GPU, and none is visible; remove it"
        )
    options: Any = args.activation_checkpointing_kwargs or {}
    if unknown := options.keys() - CHECKPOINTING:
        raise UserError(
            f"{stage}: training.gradient_checkpointing_kwargs.{min(unknown)}: no such key; expected one of "
            f"{', '.join(sorted(CHECKPOINTING))}"
        )
    is_plateau = args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    if is_plateau and args.eval_strategy == "no":
        raise UserError(
            f"{stage}: training.lr_scheduler_type: reduce_lr_on_plateau follows evaluations, and there are "
            "none; set training.eval_strategy: steps"
        )
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        raise UserError(
            f"{stage}: training.save_strategy: best needs training.metric_for_best_model, such as eval_loss"
        )
    try:
        _build_optimizer(args)
        _build_loader(args)
    except Exception as error:  # of torch, of transformers and of packages with optimizers
        raise UserError(f"{stage}: training: {one_line(error)}") from None


def _build_optimizer(args: TrainingArguments) -> None:
    model: Any = torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")  # draws no random numbers
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if args.optim_target_modules is not None:  # needs the model itself
        return
    options: Any = args.lr_scheduler_kwargs
    optimizer = cls(model.parameters(), **kwargs)
    get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(10),
        num_training_steps=10,
        scheduler_specific_kwargs=options,
    )


def _build_loader(args: TrainingArguments) -> None:
    rows: Any = [0]
    DataLoader(
        rows,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
    )
