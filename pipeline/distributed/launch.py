"""Detect launches that fell back silently (one process, DDP for FSDP, CPU for GPU).

The functions read accelerate's environment variables. Imports no torch.
"""

import os
import re
from collections.abc import Mapping

from pipeline.config import RECIPES

ON_CPU = f"--config_file {os.path.relpath(RECIPES)}/accelerate/cpu.yaml, with --num_processes"
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
NAMES_A_GPU = re.compile(r"\d|GPU-|MIG-")


def sharding_type(environment: Mapping[str, str]) -> str:
    """Return the name of what shards the weights in this launch: FSDP, DeepSpeed, or nothing."""
    return next(
        (name for variable, name in SHARDED.items() if environment.get(variable, "").lower() == "true"),
        "nothing",
    )


def unsupported_sharding(environment: Mapping[str, str], algorithm: str) -> str | None:
    """Return why a stage cannot run with the sharding of this launch, or None if it can."""
    sharding = sharding_type(environment)
    if sharding == "FSDP" and environment.get("FSDP_VERSION", "1") != "2":
        return "FSDP version 1 is not supported; set fsdp_version: 2, as in configs/accelerate/fsdp2.yaml"
    if sharding == "DeepSpeed" and environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        sharding = "DeepSpeed ZeRO-3"
    if sharding in ("FSDP", "DeepSpeed ZeRO-3") and algorithm != "ppo":
        return (
            f"algorithm: {algorithm} does not support {sharding}: evaluation cannot generate from sharded "
            "weights; use deepspeed-zero2 or multi-gpu"
        )
    return None


def launch_problem(environment: Mapping[str, str], gpus: int) -> str | None:
    """Return why this launch differs from what was requested, or None if it does not.

    `gpus` is the number of GPUs that are visible to this process.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    processes, local_processes = (
        int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0" if processes > 1 else "")

    if launched and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        return (
            "several processes were requested, but one was started, as accelerate does on a CPU; "
            f"use {ON_CPU}"
        )
    for variable, name in SHARDED.items():
        if environment.get(variable, "").lower() == "true" and not gpus:
            return (
                f"{name} was requested, which shards over GPUs, but no GPU is visible; use {ON_CPU}, or a "
                "machine with GPUs"
            )
    if launched and not gpus and NAMES_A_GPU.match(visible):
        return (
            f"a GPU was requested for each process, but none is visible; use {ON_CPU}, or a machine with GPUs"
        )
    if gpus and local_processes > gpus:
        return (
            f"{local_processes} processes were requested on this machine, but the number of visible GPUs is "
            f"{gpus}; each process needs its own GPU: --num_processes {gpus}"
        )
    return None
