"""Turn what a program passes as a dataset into a `datasets.Dataset`.

In: a dataset or several splits, a list of rows, a folder of `save_to_disk`, or what `datasets.load_dataset`
takes. Out: one dataset. A wrong input raises one `UserError`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from pipeline.data.sources import check_arrow_files, is_saved_dataset
from pipeline.errors import UserError, one_line

READ_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, OverflowError, DatasetsError)


def coerce_rows(name: str, rows: Any, splits: Sequence[str]) -> Any:
    """Return the rows of the argument `name` as a dataset.

    Of several splits, it is the first of `splits` that exists. Anything else is returned as it is. Raises
    `UserError` if the rows cannot be read, have no such split, or are a stream.
    """
    if isinstance(rows, str | Path) and rows != "":
        rows = _load(name, str(rows))
    if isinstance(rows, IterableDataset | IterableDatasetDict):
        raise UserError(
            f"{name}: expected rows that can be read in any order, found an {type(rows).__name__}; "
            "load it without streaming, or pass a list of its first rows: list(rows.take(10_000))"
        )
    if isinstance(rows, DatasetDict):
        return _pick_split(name, rows, splits)
    return _from_list(name, rows) if isinstance(rows, list) else rows


def _load(name: str, source: str) -> Any:
    try:
        if is_saved_dataset(Path(source)):
            check_arrow_files(Path(source))
            return load_from_disk(source)
        return load_dataset(source)
    except READ_ERRORS as error:
        raise UserError(
            f"{name}: {source}: not readable as a dataset: {one_line(error)}; expected a folder of "
            "save_to_disk, a folder of data files, or the name of a dataset on the hub"
        ) from error


def _pick_split(name: str, data: DatasetDict, splits: Sequence[str]) -> Dataset:
    for split in splits:
        if split in data:
            return data[split]
    raise UserError(
        f"{name}: expected a split {' or '.join(splits)}, found {', '.join(data) or 'none'}; pass one split"
    )


def _from_list(name: str, rows: list[Any]) -> Dataset:
    """Return rows as a dataset with the columns of all rows; a value that a row lacks is None."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f"{name}: row {number}: expected a dict such as {{'prompt': …}}, found a {kind}")
    columns = dict.fromkeys(column for row in rows for column in row)
    values = {column: [row.get(column) for row in rows] for column in columns}
    for column in columns:
        if not isinstance(column, str):
            raise UserError(f"{name}: column {column!r}: expected text as its name")
        try:
            Dataset.from_dict({column: values[column]})
        except READ_ERRORS as error:
            raise UserError(
                f"{name}: column {column!r}: its values are not of one type that a dataset holds: "
                f"{one_line(error)}"
            ) from error
    return Dataset.from_dict(values)
