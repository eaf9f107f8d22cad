"""The processes of a run under `accelerate launch`: rank 0 decides and writes, the others wait for it."""

import os
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
