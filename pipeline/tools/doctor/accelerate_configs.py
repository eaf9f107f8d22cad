"""What a launch by a file of configs/accelerate does, told from that file."""

from typing import Any

import yaml

from pipeline.config import RECIPES, nearest
from pipeline.distributed.launch import SHARDED
from pipeline.errors import UserError


def launch_environment(name: str) -> dict[str, str]:
    """What a launch by `configs/accelerate/NAME.yaml` leaves in the environment for `unfit`. Raises `UserError`."""
    asked = _read_launch(name)
    kind, stage = asked["distributed_type"], asked.get("deepspeed_config", {}).get("zero_stage")
    found = {variable: "true" for variable, sharded in SHARDED.items() if sharded.upper() == kind}
    return found | {
        "FSDP_VERSION": str(asked.get("fsdp_config", {}).get("fsdp_version", 1)),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
    }


def num_shards(name: str) -> int:
    """Into how many parts a launch by `configs/accelerate/NAME.yaml` cuts the weights. Raises `UserError`."""
    asked = _read_launch(name)
    cuts = asked["distributed_type"] == "FSDP" or asked.get("deepspeed_config", {}).get("zero_stage") == 3
    return int(asked["num_processes"]) if cuts else 1


def _read_launch(name: str) -> dict[str, Any]:
    files = {file.stem: file for file in sorted((RECIPES / "accelerate").glob("*.yaml"))}
    if name not in files:
        raise UserError(
            f"--launch {name}: no such file in {RECIPES}/accelerate{nearest(name, files)}; there are: {', '.join(files)}"
        )
    return dict(yaml.safe_load(files[name].read_text()))
