"""What a launch with a file of configs/accelerate will do, by the content of the file."""

from typing import Any

import yaml

from pipeline.config import RECIPES, nearest
from pipeline.distributed.launch import SHARDED
from pipeline.errors import UserError


def launch_environment(name: str) -> dict[str, str]:
    """Return the environment variables that accelerate sets in a launch with `configs/accelerate/NAME.yaml`.

    They are those that `distributed.launch.unsupported_sharding` reads. Raises `UserError`.
    """
    launch = _read_launch(name)
    kind, stage = launch["distributed_type"], launch.get("deepspeed_config", {}).get("zero_stage")
    variables = {variable: "true" for variable, sharded in SHARDED.items() if sharded.upper() == kind}
    return variables | {
        "FSDP_VERSION": str(launch.get("fsdp_config", {}).get("fsdp_version", 1)),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
    }


def num_shards(name: str) -> int:
    """Return the number of shards of the weights in a launch with `configs/accelerate/NAME.yaml`.

    It is 1 if the launch does not shard the weights. Raises `UserError`.
    """
    launch = _read_launch(name)
    zero_stage = launch.get("deepspeed_config", {}).get("zero_stage")
    shards_weights = launch["distributed_type"] == "FSDP" or zero_stage == 3
    return int(launch["num_processes"]) if shards_weights else 1


def _read_launch(name: str) -> dict[str, Any]:
    files = {file.stem: file for file in sorted((RECIPES / "accelerate").glob("*.yaml"))}
    if name not in files:
        raise UserError(
            f"--launch {name}: no such file in {RECIPES}/accelerate{nearest(name, files)}; "
            f"there are: {', '.join(files)}"
        )
    return dict(yaml.safe_load(files[name].read_text()))
