"""Find the format of a source by its columns, and the column set that is read. Imports no torch.

A wrong mapping, a missing column, or columns of no format or of several raise `UserError`.
"""

import difflib
from itertools import chain

from pipeline.config import Source, nearest
from pipeline.data.context import CONTEXT, used_columns
from pipeline.data.messages import KNOWN_KEYS
from pipeline.data.reward_columns import check_names, reward_columns, reward_values
from pipeline.data.schema import KINDS
from pipeline.data.shapes.recognize import fitting_formats, nearly_fitting
from pipeline.data.shapes.table import SHAPES
from pipeline.errors import UserError

# Column sets that a format accepts besides the columns of its kind.
# `Source.columns` maps these names to the columns of a file.
ALTERNATIVES: dict[str, list[tuple[str, ...]]] = {
    "dialogues": [("chosen", "rejected")],
    "rankings": [("prompt", "response", "rank")],
    "steps": [("question", "label"), ("input", "label")],  # PRM800K's and Math-Shepherd's
    "labels": [("text", "label"), ("messages", "label")],
    "demonstrations": [("messages",)],
}

# Format -> the kind of records it yields, if the two names differ.
FORMAT_KINDS = {"dialogues": "comparisons"}

SCORES = ("score", "scores", "rating", "ratings", "reward", "rewards")  # no ranks: the highest is the best
SEE_INSPECT = ", or see rlhf prepare --inspect {name}"
MESSAGES_COLUMNS = ("conversations", "conversation", "dialogue", "dialog", "chat")  # other names of messages


def kind_of_format(format: str | None) -> str:
    """Return the kind of records that a format yields, or the first one of several."""
    return SHAPES[format].kinds[0] if format in SHAPES else FORMAT_KINDS.get(str(format), str(format))


def find_format(source: Source, available: list[str]) -> Source:
    """Return the source with its format, which the columns show if it has none. `available` are its columns.

    A source without a row that can be read has any format. Raises `UserError` if none fits, or several do.
    """
    if source.format:
        return source
    mapped = source.columns.keys() | source.values.keys()
    names = {name for name in available if name not in used_columns(source)} | mapped
    formats = fitting_formats(names, FORMATS, mapped) if available else ["prompts"]
    name = source.path or source.hub
    if len(formats) == 1:
        if source.classes and kind_of_format(formats[0]) != "labels":
            raise UserError(f"{name}: 'classes' is not read with format {formats[0]}, which its columns show")
        return source.model_copy(update={"format": formats[0]})
    if formats:
        raise UserError(
            f"{name}: its columns fit {' and '.join(formats)}; pick one, such as format: {formats[0]}"
        )
    nearly = [f"{format} lacks {column!r}" for format, column in nearly_fitting(names, FORMATS).items()]
    raise UserError(
        f"{name}: no format has its columns: {', '.join(available)}; "
        + (f"nearly: {', '.join(nearly[:3])}; " if nearly else "")
        + "map them with 'format' and 'columns' of the source"
        + SEE_INSPECT.format(name=name)
    )


def column_sets(format: str | None) -> list[tuple[str, ...]]:
    """Return the column sets by which rows of a format are read."""
    if format in SHAPES:
        return list(SHAPES[format].columns)
    standard = [KINDS[format].columns] if format in KINDS else []
    return [*standard, *ALTERNATIVES.get(str(format), [])]


def shape_columns(format: str | None) -> tuple[str, ...]:
    """Return the columns that are part of a published shape, also those that a row may lack."""
    return (*chain(*SHAPES[format].columns), *SHAPES[format].known) if format in SHAPES else ()


# The formats that are no published shape, with their column sets.
FORMATS = {
    format: column_sets(format)
    for format in dict.fromkeys((*KINDS, *ALTERNATIVES))
    if format not in ("answers", "step_answers")  # of `rlhf score`
}


def choose_columns(source: Source, available: list[str]) -> tuple[str, ...]:
    """Return the column set of the format that the available and the mapped columns fill best.

    Raises `UserError` if a mapping is wrong or a column is missing.
    """
    sets, kind = column_sets(source.format), KINDS[kind_of_format(source.format)]
    optional = (*kind.optional, *CONTEXT, *shape_columns(source.format))
    known = dict.fromkeys([*(name for columns in sets for name in columns), *optional])
    if kind.keeps_columns:  # a mapped column may have any name
        known |= dict.fromkeys([*source.columns, *source.values])
        names = [*reward_columns(source, available), *reward_values(source)]
        check_names(name_source(source), names, "rename it with columns, or pass it over with ignore: [{}]")
    _check_mapping(source, list(known), available)
    _check_ignored(source, available)

    # A mapped column must be read, so a column set without it is not the one the user means.
    mapped = source.columns | source.values
    candidates = [columns for columns in sets if mapped.keys() <= {*columns, *optional}] or sets
    missing = {
        columns: [name for name in columns if name not in mapped and name not in available]
        for columns in candidates
    }
    columns = min(candidates, key=lambda columns: len(missing[columns]))
    if available and missing[columns]:
        raise _missing_column(source, missing[columns][0], available)
    return columns


def _check_mapping(source: Source, known: list[str], available: list[str]) -> None:
    """Raise `UserError` if `columns` or `values` names an unknown column, or maps one that no row has."""
    for ours, theirs in (source.columns | {name: [] for name in source.values}).items():
        if ours not in known:
            raise UserError(
                f"{name_source(source)}: columns maps {ours!r}, expected one of {', '.join(known)}"
                f"{nearest(ours, known)}"
            )
        if ours.startswith("rank") and isinstance(theirs, str) and theirs in SCORES:
            raise UserError(
                f"{name_source(source)}: columns maps {ours!r} to {theirs!r}: a high score is good, a high "
                "rank is not; format: scored reads prompt, completions and scores"
            )
        for name in [theirs] if isinstance(theirs, str) else theirs:
            if available and name not in available:
                raise UserError(
                    f"{name_source(source)}: columns maps {ours!r} to {name!r}, found {', '.join(available)}"
                    f"{nearest(name, available)}"
                )


def _check_ignored(source: Source, available: list[str]) -> None:
    """Raise `UserError` if `ignore` names neither a column nor a key of messages."""
    for name in source.ignore if available else ():
        if name not in available and name not in KNOWN_KEYS:
            raise UserError(
                f"{name_source(source)}: ignore names {name!r}, found {', '.join(available)}"
                f"{nearest(name, available)}"
            )


def _missing_column(source: Source, name: str, available: list[str]) -> UserError:
    """Build the error for a missing column, with the format or the mapping that would read the file."""
    start = f"{name_source(source)} needs a column {name!r}, found {', '.join(available)}"
    formats = fitting_formats(available, FORMATS) if source.format in {*FORMATS, *SHAPES} else []
    if len(formats) == 1 and not source.columns:
        return UserError(f"{start}; format: {formats[0]} reads them")
    alike = [other for other in MESSAGES_COLUMNS if name == "messages" and other in available]
    near = difflib.get_close_matches(name, available, n=1, cutoff=0.8)
    near = [other for other in near if other.endswith("s") == name.endswith("s")]  # else one has lists
    return UserError(f"{start}; use columns: {{{name}: {next(iter(alike or near), 'THEIRS')}}}")


def name_source(source: Source) -> str:
    """Return the source and its format, as errors begin."""
    return f"{source.path or source.hub}: format {source.format}"
