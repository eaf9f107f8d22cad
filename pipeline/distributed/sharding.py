"""Sharded weights (FSDP2, DeepSpeed ZeRO): gather them for saving and for generation."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.models import unwrap_model_for_generation

Result = TypeVar("Result")


def full_state_dict(trainer: Trainer) -> dict[str, Any] | None:
    """Return the trained model's full state on rank 0, as `save_pretrained` takes it.

    None if the weights are not sharded. All ranks must call it.
    """
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.get_state_dict(trainer.deepspeed)
    return trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None


def keep_output_dtype(trainer: Trainer) -> None:
    """Stop FSDP2 from casting model outputs to the dtype of the parameters, as accelerate configures it."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def disable_zero3_init(args: TrainingArguments) -> None:
    """Load full models under ZeRO-3 too, because the stages inspect them before training.

    DeepSpeed then shards the model that it gets.
    """
    if is_zero3(args):
        unset_hf_deepspeed_config()


def is_zero3(args: TrainingArguments) -> bool:
    """Return whether the weights are sharded by DeepSpeed ZeRO-3."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def with_full_params(trainer: Trainer, model: Any, submodule: Any, work: Callable[[], Result]) -> Result:
    """Run `work` with the full parameters of `submodule` of the trainer's `model` on every rank.

    Generation needs this: ranks take different numbers of forward passes, and a sharded forward pass is a
    collective. It costs the memory of the whole submodule (under ZeRO-3 of the whole model) in the precision
    of the computation. All ranks must call it.
    """
    if is_zero3(trainer.args):
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator):
            return work()
    if not isinstance(model, FSDPModule):
        return work()

    root: Any = model
    if not hasattr(root, "_run_as_forward"):
        root._run_as_forward = lambda function: function()
        # The first forward pass must enter through the model, or FSDP would take a single layer as the root.
        register_fsdp_forward_method(root, "_run_as_forward")
    shards = [module for module in submodule.modules() if isinstance(module, FSDPModule)]
    return root._run_as_forward(lambda: _run_unsharded(shards, work))


def _run_unsharded(shards: list[FSDPModule], work: Callable[[], Result]) -> Result:
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        return work()
    finally:
        for shard in shards:
            shard.reshard()
            shard.set_reshard_after_forward(True, recurse=False)
