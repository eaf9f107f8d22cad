"""Find the rows of a source: its files, a `save_to_disk` folder, or a hub dataset. Imports no torch.

A path that does not exist, a folder without a file of a known type, or a dataset that cannot be read raises
`UserError`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Source
from pipeline.data.files import ADVICE, BATCH_ROWS, find_reader, first_line, parse_batch
from pipeline.data.folders import FileGroup, find_files
from pipeline.data.json_rows import find_fault
from pipeline.data.schema import SPLITS, RawRow, RowError
from pipeline.errors import UserError


def iter_rows(source: Source) -> Iterator[RawRow]:
    """Yield the rows of a source in order. Raises `UserError`."""
    if source.hub or is_saved_dataset(Path(source.path or "")):
        yield from _read_dataset(str(source.hub or source.path), _load_dataset(source))
        return

    group = _group_files(source)
    for file in group.files:
        reader, splits = find_reader(file), SPLITS if source.split else group.splits_of(file)
        if reader:
            yield from (row._replace(splits=splits) for row in reader(file))


def source_files(source: Source) -> list[Path]:
    """Return the files of a source in the order of reading, or its `save_to_disk` folder.

    Raises `UserError` if the path does not exist, has no file of a known type, or cannot have the `split`.
    """
    if not source.path:
        return []
    path = Path(source.path)
    return [path] if is_saved_dataset(path) else list(_group_files(source).files)


def describe_reading(source: Source) -> list[str]:
    """Return what was done with the files of a source beyond reading each: a line for each fact."""
    if not source.path:
        return []
    if not is_saved_dataset(Path(source.path)):
        return _group_files(source).describe(source.split)
    if source.split or not (splits := _saved_splits(Path(source.path))):
        return []
    return [f"read split train; not read: {', '.join(splits)}; 'split' of a source picks one"]


def _group_files(source: Source) -> FileGroup:
    path = Path(str(source.path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check 'path' of the source")
    if source.split and not path.is_dir():
        raise UserError(
            f"{path}: split={source.split!r} is only read from a hub dataset, a save_to_disk folder or a "
            "folder of files; remove it"
        )
    return find_files(path, source.split)


# Datasets


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder is of `save_to_disk`, and more than what is left of one."""
    is_one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return is_one or ((path / "dataset_dict.json").is_file() and any(path.glob("*/state.json")))


def _saved_splits(path: Path) -> list[str]:
    """Return the splits of a saved `DatasetDict` that are not read without a `split`."""
    return sorted(state.parent.name for state in path.glob("*/state.json") if state.parent.name != "train")


def check_arrow_files(folder: Path) -> None:
    """Read each Arrow file through, batch by batch. Raises `ValueError` or `OSError` if one is damaged.

    Datasets are mapped into memory, and a map that ends too early kills the process.
    """
    import pyarrow

    for file in sorted(folder.rglob("*.arrow")):
        with pyarrow.OSFile(str(file)) as source, pyarrow.ipc.open_stream(source) as batches:
            for batch in batches:
                batch.validate(full=True)


def _load_dataset(source: Source) -> Any:
    """Load the `datasets.Dataset` of a hub id or of a `save_to_disk` folder.

    Raises `UserError` if it cannot be read or lacks the split.
    """
    import datasets

    split = source.split or "train"
    try:
        if source.hub:
            return datasets.load_dataset(source.hub, source.subset, split=split, revision=source.revision)
        check_arrow_files(Path(str(source.path)))
        data = datasets.load_from_disk(str(source.path))
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
    ) as error:
        hint = (
            "check hub, subset, split and revision of the source, or download it and set its path"
            if source.hub
            else "save it again"
        )
        raise UserError(
            f"{source.hub or source.path}: not readable as a dataset: {first_line(error)}; {hint}"
        ) from None

    if isinstance(data, datasets.Dataset):
        return data
    if split not in data:
        raise UserError(
            f"{source.path}: no split {split!r}, found {', '.join(data)}; set 'split' of the source"
        )
    return data[split]


def _read_dataset(name: str, dataset: Any) -> Iterator[RawRow]:
    """Yield the rows, with class indices replaced by the names that the features have for them."""
    class_names = {
        column: feature.names for column, feature in dataset.features.items() if hasattr(feature, "int2str")
    }
    for number, (data, fault) in enumerate(_iter_dataset(dataset), 1):
        named = {
            column: names[data[column]]
            for column, names in class_names.items()
            if data[column] in range(len(names))
        }
        yield RawRow(name, number, {**data, **named}, fault)


def _iter_dataset(dataset: Any) -> Iterator[tuple[dict[str, Any], RowError | None]]:
    """Yield each row with its fault; the rows of a batch that cannot be decoded are read one by one.

    Media stay bytes: a decoder of them may be missing, and is no value.
    """
    for column, feature in dataset.features.items():
        if getattr(feature, "decode", False) and "bytes" in str(feature.pa_type):
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    for start in range(0, len(dataset), BATCH_ROWS):
        numbers = range(start, min(start + BATCH_ROWS, len(dataset)))
        try:
            columns = dataset[numbers]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        except Exception:  # whatever the decoding of some feature raises; it is told for its row
            yield from (_read_row(dataset, number) for number in numbers)
        else:
            yield from ((row, find_fault(row)) for row in rows)


def _read_row(dataset: Any, number: int) -> tuple[dict[str, Any], RowError | None]:
    try:
        row: dict[str, Any] = dataset[number]
    except Exception as error:
        ((values, fault),) = parse_batch(dataset.with_format("arrow")[number : number + 1])
        return values, fault or RowError("unreadable-value", f"{first_line(error)}; {ADVICE}")
    return row, find_fault(row)
