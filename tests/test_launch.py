"""What a launch left in the environment tells whether it got what it asked for."""

import pytest

from pipeline.launch import why_not

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
    assert why_not(environment, gpus) is None


@pytest.mark.parametrize(
    ("environment", "gpus", "found"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "True"}, 0, "several processes were asked for and one was started"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 0, "a GPU was asked for each process, and none is visible"),
        (TWO, 0, "a GPU was asked for each process, and none is visible"),
        (TWO | {"ACCELERATE_USE_FSDP": "true", "CUDA_VISIBLE_DEVICES": "-1,-1"}, 0, "FSDP was asked for"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 0, "DeepSpeed was asked for"),
        (TWO, 1, "2 processes were asked for on this machine, which shows 1 GPUs; each needs its own: --num_processes 1"),
    ],
)
def test_what_did_not_come_is_told(environment, gpus, found):
    assert found in str(why_not(ACCELERATE | environment, gpus))
