"""Weights that are sharded over the processes (FSDP2, DeepSpeed ZeRO): gathered to be saved, and whole while each rank reads on its own."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.models import unwrap_model_for_generation

Result = TypeVar("Result")


def full_state_dict(trainer: Trainer) -> dict[str, Any] | None:
    """The trained model's state, whole on rank 0, as `save_pretrained` takes it; None where each rank has the model whole. All call it."""
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.get_state_dict(trainer.deepspeed)
    return trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None


def keep_output_dtype(trainer: Trainer) -> None:
    """What a sharded model gives stays in the precision in which it was computed: accelerate has FSDP2 round it to that of the weights."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def disable_zero3_init(args: TrainingArguments) -> None:
    """Under ZeRO-3 too models are loaded whole, as they are looked at before they are trained; DeepSpeed cuts what it is given."""
    if is_zero3(args):
        unset_hf_deepspeed_config()


def is_zero3(args: TrainingArguments) -> bool:
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def with_full_params(trainer: Trainer, model: Any, part: Any, work: Callable[[], Result]) -> Result:
    """`work()`, while which every rank has all weights of `part` of the trainer's `model`: a sharded forward waits for all ranks, and in
    generation they differ in how many they need. All call it; it costs the memory of the whole part (under ZeRO-3 of the whole model) in
    the precision that it computes in."""
    if is_zero3(trainer.args):
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator):
            return work()
    if not isinstance(model, FSDPModule):
        return work()
    root: Any = model
    if not hasattr(root, "_at_leisure"):
        root._at_leisure = lambda work: work()
        register_fsdp_forward_method(
            root, "_at_leisure"
        )  # a first forward through a layer alone would make that the root
    return root._at_leisure(
        lambda: _unsharded([module for module in part.modules() if isinstance(module, FSDPModule)], work)
    )


def _unsharded(shards: list[FSDPModule], work: Callable[[], Result]) -> Result:
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        return work()
    finally:
        for shard in shards:
            shard.reshard()
            shard.set_reshard_after_forward(True, recurse=False)
