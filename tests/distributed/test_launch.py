"""What a launch left in the environment tells whether it got what it asked for."""

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from pipeline.config import RECIPES
from pipeline.distributed.launch import launch_problem, sharding_type, unsupported_sharding
from pipeline.tools.doctor.accelerate_configs import launch_environment, num_shards

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, 0),
        ({}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 0),  # a habit of the shell, not of a launch
        (ACCELERATE, 0),
        (ACCELERATE | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        (TWO, 0),  # torchrun
        (ACCELERATE | TWO | {"CUDA_VISIBLE_DEVICES": "-1,-1"}, 0),
        (ACCELERATE | TWO, 2),
        (ACCELERATE | TWO | {"ACCELERATE_USE_FSDP": "true"}, 2),
        (ACCELERATE | TWO | {"WORLD_SIZE": "16", "ACCELERATE_USE_FSDP": "false"}, 2),
    ],
)
def test_what_was_asked_for_came(environment, gpus):
    assert launch_problem(environment, gpus) is None


@pytest.mark.parametrize(
    ("environment", "gpus", "found"),
    [
        (
            {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"},
            0,
            "several processes were requested, but one was started",
        ),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 0, "a GPU was requested for each process, but none is visible"),
        (TWO, 0, "a GPU was requested for each process, but none is visible"),
        (TWO | {"ACCELERATE_USE_FSDP": "true", "CUDA_VISIBLE_DEVICES": "-1,-1"}, 0, "FSDP was requested"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 0, "DeepSpeed was requested"),
        (
            TWO,
            1,
            "2 processes were requested on this machine, but the number of visible GPUs is 1; each "
            "process needs its own GPU: --num_processes 1",
        ),
    ],
)
def test_what_did_not_come_is_told(environment, gpus, found):
    assert found in str(launch_problem(ACCELERATE | environment, gpus))


FSDP, ZERO = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environment", "algorithm", "found"),
    [
        ({}, "grpo", None),
        (FSDP | {"FSDP_VERSION": "2"}, "ppo", None),
        (
            FSDP | {"FSDP_VERSION": "2"},
            "grpo",
            "algorithm: grpo does not support FSDP: evaluation cannot generate from sharded weights",
        ),
        (FSDP, "ppo", "FSDP version 1 is not supported; set fsdp_version: 2"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "rloo", None),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ppo", None),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "rloo",
            "algorithm: rloo does not support DeepSpeed ZeRO-3: evaluation cannot generate",
        ),
    ],
)
def test_sharding_that_a_stage_cannot_use_is_refused(environment, algorithm, found):
    problem = unsupported_sharding(environment, algorithm)
    assert problem is None if found is None else str(problem).startswith(found)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("cpu", 1), ("multi-gpu", 1), ("deepspeed-zero2", 1), ("deepspeed-zero3", 8), ("fsdp2", 8)],
)
def test_which_files_cut_the_weights(name, parts):
    assert num_shards(name) == parts


@pytest.mark.parametrize(
    ("name", "by", "algorithm", "fits"),
    [
        ("cpu", "nothing", "grpo", True),
        ("fsdp2", "FSDP", "ppo", True),
        ("fsdp2", "FSDP", "grpo", False),
        ("deepspeed-zero2", "DeepSpeed", "grpo", True),
        ("deepspeed-zero3", "DeepSpeed", "rloo", False),
    ],
)
def test_a_file_tells_beforehand_which_stages_it_is_for(name, by, algorithm, fits):
    assert sharding_type(launch_environment(name)) == by
    assert (unsupported_sharding(launch_environment(name), algorithm) is None) == fits


@pytest.mark.parametrize("file", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_understands_the_files(file):
    """As far as its own parser goes, without starting anything."""
    parsed = load_config_from_file(str(file))
    args = launch_command_parser().parse_args(["--config_file", str(file), "-m", "pipeline"])
    args, defaults, _ = _validate_launch_command(args)
    assert args.num_processes == parsed.num_processes == {"single-gpu": 1, "cpu": 2}.get(file.stem, 8)
    assert (args.use_fsdp, args.use_deepspeed) == (file.stem == "fsdp2", file.stem.startswith("deepspeed"))
    if args.use_fsdp:
        assert prepare_multi_gpu_env(args) | {
            "FSDP_VERSION": "2",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        } == prepare_multi_gpu_env(args)
    assert defaults.mixed_precision == "no"
