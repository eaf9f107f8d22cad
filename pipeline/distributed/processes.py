"""The processes of a run under `accelerate launch`.

Rank 0 decides and writes while the other ranks wait. Long work is divided among all ranks.
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from pipeline.distributed.launch import launch_problem
from pipeline.errors import UserError

Value = TypeVar("Value")
Item = TypeVar("Item")
Result = TypeVar("Result")

# How long the other ranks wait while rank 0 prepares, publishes or evaluates. If a process dies, the launcher
# ends all of them at once.
TIMEOUT = timedelta(days=7)


def is_main_process() -> bool:
    """Return whether this is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def broadcast(value: Value) -> Value:
    """Return rank 0's value on every rank. All ranks must call it."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    init_process_group()
    return broadcast_object_list([value])[0]


def on_main_process(work: Callable[[], Value]) -> Value:
    """Run `work` on rank 0 and return its result on every rank. All ranks must call it.

    If `work` fails, rank 0 raises its error, and the other ranks exit silently with status 2.
    """
    if not is_main_process():
        failed, value = broadcast((True, None))
        if failed:
            raise SystemExit(2)
        return value  # type: ignore[return-value]
    try:
        value = work()
    except BaseException:
        broadcast((True, None))
        raise
    return broadcast((False, value))[1]  # type: ignore[return-value]


def map_across_processes(
    work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]
) -> list[Result]:
    """Apply `work` to each process's share of `items`, and return all results on every process.

    The results are in the order of the items. `work` is not called on a process whose share is empty.
    """
    processes = world_size()
    if processes == 1:
        return work(items)
    from accelerate.utils import gather_object

    init_process_group()
    rank = int(os.environ["RANK"])
    first, end = len(items) * rank // processes, len(items) * (rank + 1) // processes
    return list(gather_object(work(items[first:end]) if end > first else []))


def is_initialized() -> bool:
    """Return whether this process has joined the process group."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def init_process_group() -> None:
    """Join the process group. Raises `UserError` if the launch differs from what was requested."""
    import torch

    gpus = torch.cuda.device_count()
    if problem := launch_problem(os.environ, gpus):
        raise UserError(f"the launch: {problem}")
    if world_size() == 1 or is_initialized():
        return
    from accelerate import PartialState

    try:
        joined = PartialState(cpu=not gpus, timeout=TIMEOUT).num_processes
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the launch: the processes cannot connect at {address}: {error}; choose another port: "
            "--main_process_port 0"
        ) from None
    if joined != world_size():
        raise UserError(
            f"the launch: {world_size()} processes were requested, but {joined} joined; start them with "
            "accelerate launch"
        )


def destroy_process_group() -> None:
    """Leave the process group, if this process has joined it.

    Its threads must end before the interpreter does, or they abort the process (pytorch/pytorch#179291).
    """
    if is_initialized():
        gc.collect()  # a model wrapped for several processes may hold the group
        sys.modules["torch"].distributed.destroy_process_group()
