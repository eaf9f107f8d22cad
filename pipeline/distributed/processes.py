"""The processes of a run under `accelerate launch`: rank 0 decides and writes, the others wait for it; long work is shared out."""

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

# How long the others wait for rank 0 to prepare, to publish, to evaluate; a process that dies ends them all at once, by its launcher.
TIMEOUT = timedelta(days=7)


def is_main_process() -> bool:
    """True on rank 0, or in the only process."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """The number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def broadcast(value: Value) -> Value:
    """Rank 0's value on every rank, once all have come here."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    init_process_group()
    return broadcast_object_list([value])[0]


def on_main_process(work: Callable[[], Value]) -> Value:
    """`work()` on rank 0, whose result every rank gets; where it fails there, the others leave without a word."""
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
    """`work` on all items, each process doing its share of them, if it has one; every process gets all results, in
    the order of the items."""
    processes = world_size()
    if processes == 1:
        return work(items)
    from accelerate.utils import gather_object

    init_process_group()
    first, end = (
        len(items) * rank // processes for rank in (int(os.environ["RANK"]), int(os.environ["RANK"]) + 1)
    )
    return list(gather_object(work(items[first:end]) if end > first else []))


def is_initialized() -> bool:
    """Whether this process has entered the group of those it was started with."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def init_process_group() -> None:
    """Enter that group. Raises `UserError` where the launch did not get what it asked for."""
    import torch

    gpus = torch.cuda.device_count()
    if problem := launch_problem(os.environ, gpus):
        raise UserError(f"the launch: {problem}")
    if world_size() == 1 or is_initialized():
        return
    from accelerate import PartialState

    try:
        found = PartialState(cpu=not gpus, timeout=TIMEOUT).num_processes
    except torch.distributed.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the launch: the processes cannot meet at {place}: {error}; name another port: --main_process_port 0"
        ) from None
    if found != world_size():
        raise UserError(
            f"the launch: {world_size()} processes were asked for, and {found} came together; start them with accelerate launch"
        )


def destroy_process_group() -> None:
    """Leaves the group, if it was joined: its threads must be gone before the interpreter is, or they abort the process
    (pytorch/pytorch#179291)."""
    if is_initialized():
        gc.collect()  # a model wrapped for several processes may hold the group
        sys.modules["torch"].distributed.destroy_process_group()
