"""Find the rows of a source: its files, a `save_to_disk` folder, or a hub dataset. Imports no torch.

A path that does not exist, a folder without a file of a known type, or a dataset that cannot be read raises
`UserError`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Source
from pipeline.data.files import READERS, first_line
from pipeline.data.schema import RawRow
from pipeline.errors import UserError


def iter_rows(source: Source) -> Iterator[RawRow]:
    """Yield the rows of a source in order. Raises `UserError`."""
    if source.hub or _is_saved_dataset(Path(source.path or "")):
        yield from _read_dataset(str(source.hub or source.path), _load_dataset(source))
    else:
        for file in source_files(source):
            yield from READERS[file.suffix.lower()](file)


def source_files(source: Source) -> list[Path]:
    """Return the files of a source, sorted, or its `save_to_disk` folder.

    Raises `UserError` if the path does not exist, has no file of a known type, or cannot have the `split`.
    """
    if not source.path:
        return []

    path = Path(source.path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check 'path' of the source")
    if _is_saved_dataset(path):
        return [path]
    if source.split != "train":
        raise UserError(
            f"{path}: split={source.split!r} is only read from a hub dataset or a save_to_disk folder; "
            "remove it, or name a file"
        )

    files, other_names = _split_files(path)
    if not files:
        raise UserError(
            f"{path}: expected {', '.join(READERS)}, a folder of such files, "
            f"or a save_to_disk folder of datasets; found {', '.join(other_names[:5]) or 'nothing'}"
        )
    return files


def skipped_files(source: Source) -> list[str]:
    """Return the names in a folder of files that are not read."""
    path = Path(source.path or "")
    return _split_files(path)[1] if source.path and path.is_dir() and not _is_saved_dataset(path) else []


def _split_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return (files to read, names of the others) of a folder or of a single file."""
    paths = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
    files = [file for file in paths if file.suffix.lower() in READERS and file.is_file()]
    return files, [file.name for file in paths if file not in files]


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_dataset(source: Source) -> Any:
    """Load the `datasets.Dataset` of a hub id or of a `save_to_disk` folder.

    Raises `UserError` if it cannot be read or lacks the split.
    """
    import datasets

    try:
        if source.hub:
            return datasets.load_dataset(
                source.hub, source.subset, split=source.split, revision=source.revision
            )
        data = datasets.load_from_disk(str(source.path))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
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
    if source.split not in data:
        raise UserError(
            f"{source.path}: no split {source.split!r}, found {', '.join(data)}; set 'split' of the source"
        )
    return data[source.split]


def _read_dataset(name: str, dataset: Any) -> Iterator[RawRow]:
    """Yield the rows, with class indices replaced by the names that the features have for them."""
    class_names = {
        column: feature.names for column, feature in dataset.features.items() if hasattr(feature, "int2str")
    }
    for number, data in enumerate(_iter_dataset(name, dataset), 1):
        named = {
            column: names[data[column]]
            for column, names in class_names.items()
            if data[column] in range(len(names))
        }
        yield RawRow(name, number, {**data, **named})


def _iter_dataset(name: str, dataset: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except (OSError, ValueError, OverflowError, ImportError) as error:
        raise UserError(
            f"{name}: has a value that cannot be read: {first_line(error)}; "
            "drop that column, or save it as text"
        ) from None
