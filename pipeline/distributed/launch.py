"""Detect launches that fell back silently (one process, DDP for FSDP, CPU for GPU) from accelerate's environment variables."""

import os
import re
from collections.abc import Mapping

from pipeline.config import RECIPES

ON_CPU = f"--config_file {os.path.relpath(RECIPES)}/accelerate/cpu.yaml, with --num_processes"

SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}

NAMES_A_GPU = re.compile(r"\d|GPU-|MIG-")


def sharding_type(environment: Mapping[str, str]) -> str:
    """What shards the weights of this launch: FSDP, DeepSpeed, or nothing."""
    return next(
        (name for variable, name in SHARDED.items() if environment.get(variable, "").lower() == "true"),
        "nothing",
    )


def unsupported_sharding(environment: Mapping[str, str], algorithm: str) -> str | None:
    """Why a stage does not run on weights that are sharded so; None where it does."""
    by = sharding_type(environment)
    if by == "FSDP" and environment.get("FSDP_VERSION", "1") != "2":
        return "FSDP of version 1; set fsdp_version: 2, as configs/accelerate/fsdp2.yaml has it"
    cut = by == "FSDP" or (by == "DeepSpeed" and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")
    if cut and algorithm != "ppo":
        return f"weights cut by {by}, with algorithm: {algorithm}, whose policy could not draw evaluations; use deepspeed-zero2 or multi-gpu"
    return None


def launch_problem(environment: Mapping[str, str], gpus: int) -> str | None:
    """None where this process is one of those that were asked for; `gpus` are those that it sees."""
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    processes, here = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0" if processes > 1 else "")
    if launched and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        return (
            f"several processes were asked for and one was started, as accelerate does on a CPU; use {ON_CPU}"
        )
    for variable, name in SHARDED.items():
        if environment.get(variable, "").lower() == "true" and not gpus:
            return f"{name} was asked for, which shards over GPUs, and none is visible; use {ON_CPU}, or a machine with GPUs"
    if launched and not gpus and NAMES_A_GPU.match(visible):
        return f"a GPU was asked for each process, and none is visible; use {ON_CPU}, or a machine with GPUs"
    if gpus and here > gpus:
        return f"{here} processes were asked for on this machine, which shows {gpus} GPUs; each needs its own: --num_processes {gpus}"
    return None
