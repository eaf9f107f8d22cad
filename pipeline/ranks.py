"""The processes of a run under `accelerate launch`: rank 0 decides and writes, the others wait for it."""

import gc
import os
import sys
from datetime import timedelta
from typing import TypeVar

Value = TypeVar("Value")
# How long the others wait for rank 0 to prepare, to publish, to evaluate; a process that dies ends them all at once, by its launcher.
PATIENCE = timedelta(days=7)


def is_main_process() -> bool:
    """True on rank 0, or in the only process."""
    return os.environ.get("RANK", "0") == "0"


def agree(value: Value) -> Value:
    """Rank 0's value on every rank, once all have come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(timeout=PATIENCE)  # joins the process group, where nothing has yet
    return broadcast_object_list([value])[0]


def leave() -> None:
    """Leaves the process group, if one was joined: its threads must be gone before the interpreter is, or they abort the process
    (pytorch/pytorch#179291)."""
    if "torch" not in sys.modules:
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a model wrapped for several processes may hold the group
        distributed.destroy_process_group()
