"""Find the format of a file from the names of its columns. Imports no torch.

A format fits if the file has all columns of one of its sets. If another one that fits knows these columns and
more, it is meant: `prompt`, `chosen`, `rejected` are comparisons, and no prompts. If several are left, the
user picks one.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from pipeline.data.shapes.table import SHAPES

ColumnSets = Mapping[str, Collection[tuple[str, ...]]]  # by the name of their format

# Columns that judge a response. A format that learns from every response does not fit if one would be unread.
VERDICTS = {
    "label", "labels", "kto_tag", "rating", "ratings", "score", "scores", "rank", "ranks", "reward",
    "rewards", "preference", "winner", "choice", "chosen", "rejected", "helpfulness", "quality", "toxicity",
    "is_toxic",
}  # fmt: skip

# Columns that prompts may have. Beside others, a lone `prompt` does not say what a file is for.
BESIDE_PROMPTS = {
    "answer", "solution", "ground_truth", "system", "system_prompt", "system_message", "history", "id",
    "prompt_id",
}  # fmt: skip


class Candidate(NamedTuple):
    """A format, one of its column sets, and every column that it knows."""

    format: str
    columns: frozenset[str]
    known: frozenset[str]


def fitting_formats(
    names: Collection[str], column_sets: ColumnSets, mapped: Collection[str] = ()
) -> list[str]:
    """Return the formats that fit a file with the columns `names`: one if it is recognized.

    `column_sets` are those of the formats that are kinds of records; the published shapes are added. The user
    named the `mapped` columns, so a format that does not read them is not meant if another one does.
    """
    fitting = [item for item in _candidates(column_sets) if _fits(item, names)]
    read = {name for item in fitting for name in item.known & {*mapped}}
    fitting = [item for item in fitting if read <= item.known]
    best = [item for item in fitting if not any(_is_part_of(item, other) for other in fitting)]
    return [*dict.fromkeys(item.format for item in best)]


def nearly_fitting(names: Collection[str], column_sets: ColumnSets) -> dict[str, str]:
    """Return the formats of which a file lacks one column, and which column that is."""
    lacking: dict[str, str] = {}
    for item in _candidates(column_sets):
        missing = [column for column in item.columns if column not in names]
        if len(missing) == 1 < len(item.columns):
            lacking.setdefault(item.format, missing[0])
    return lacking


def _candidates(column_sets: ColumnSets) -> list[Candidate]:
    kinds = [
        Candidate(name, frozenset(columns), frozenset(columns))
        for name, sets in column_sets.items()
        for columns in sets
    ]
    shapes = [
        Candidate(name, frozenset(columns), frozenset((*columns, *shape.known)))
        for name, shape in SHAPES.items()
        for columns in shape.columns
    ]
    return kinds + shapes


def _is_part_of(item: Candidate, other: Candidate) -> bool:
    """Return whether another format knows all columns that show this one, and more."""
    knows_all = item.columns <= other.known or "*" in other.known
    return knows_all and not other.columns <= item.known


def _fits(item: Candidate, names: Collection[str]) -> bool:
    if not item.columns <= set(names):
        return False
    others = set(names) - item.known
    if item.format == "prompts":
        return others <= BESIDE_PROMPTS
    kinds = SHAPES[item.format].kinds if item.format in SHAPES else (item.format,)
    return kinds != ("demonstrations",) or not others & VERDICTS
