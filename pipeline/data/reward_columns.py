"""The columns of a prompt's row that only reward functions read. Imports no torch.

All columns of a source of format `prompts` are such columns, except the prompt, columns that are read as
turns, and those of `ignore`.
"""

from collections.abc import Iterable
from typing import Any

from pipeline.config import Source
from pipeline.data.context import CONTEXT, is_refused, used_columns
from pipeline.errors import UserError

# Arguments of a reward function, here or in TRL; no column can have the name of one.
ARGUMENTS = (
    "prompts", "completions", "completion_ids", "ended",
    "trainer_state", "log_extra", "log_metric", "environments",
)  # fmt: skip
OUR_COLUMNS = frozenset(("prompt", *CONTEXT, *(name for names in CONTEXT.values() for name in names)))


def reward_columns(source: Source, columns: Iterable[str]) -> dict[str, str | list[str]]:
    """Return which of the `columns` of a row are kept for reward functions, by the names that they get.

    A column without a name is an index, as pandas writes it, and is not kept.
    """
    taken = {"", *OUR_COLUMNS, *used_columns(source), *source.columns, *source.values}
    kept: dict[str, str | list[str]] = {
        name: name for name in columns if name not in taken and not is_refused(name)
    }
    return kept | {name: theirs for name, theirs in source.columns.items() if name not in OUR_COLUMNS}


def reward_values(source: Source) -> dict[str, Any]:
    """Return the columns for reward functions that `values` of the source gives to every row."""
    return {name: value for name, value in source.values.items() if name not in OUR_COLUMNS}


def check_names(where: str, columns: Iterable[str], remedy: str) -> None:
    """Raise `UserError` if a column has the name of an argument of reward functions.

    `{}` in the remedy stands for the column.
    """
    for name in columns:
        if name in ARGUMENTS:
            raise UserError(
                f"{where}: column {name!r}: reward functions have an argument of this name, so the column "
                f"cannot reach them; {remedy.replace('{}', name)}"
            )
