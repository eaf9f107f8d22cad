"""What was asked of `accelerate launch` and did not come, told by the environment it leaves: it says nothing of these itself."""

import re
from collections.abc import Mapping

ON_CPU = "--config_file configs/accelerate/cpu.yaml, with --num_processes"
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
NAMES_A_GPU = re.compile(r"\d|GPU-|MIG-")


def why_not(environment: Mapping[str, str], gpus: int) -> str | None:
    """None where this process is one of those that were asked for; `gpus` are those that it sees."""
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    processes, here = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0" if processes > 1 else "")
    if launched and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        return f"several processes were asked for and one was started, as accelerate does on a CPU; use {ON_CPU}"
    for variable, name in SHARDED.items():
        if environment.get(variable, "").lower() == "true" and not gpus:
            return f"{name} was asked for, which shards over GPUs, and none is visible; use {ON_CPU}, or a machine with GPUs"
    if launched and not gpus and NAMES_A_GPU.match(visible):
        return f"a GPU was asked for each process, and none is visible; use {ON_CPU}, or a machine with GPUs"
    if gpus and here > gpus:
        return f"{here} processes were asked for on this machine, which shows {gpus} GPUs; each needs its own: --num_processes {gpus}"
    return None
