"""Opening the records a stage needs."""

from pathlib import Path

from datasets import DatasetDict, disable_caching, load_from_disk

from pipeline.artifacts.manifest import Artifact
from pipeline.data.schema import KINDS
from pipeline.errors import UserError


def open_records(records: Artifact, kind: str) -> DatasetDict:
    """The `DatasetDict` of one kind, with splits `train`, `validation` and `test` (empty where a foreign folder lacks them).

    Raises `UserError` where the kind or one of its columns is not there.
    """
    folder = records.path if records.is_external else records.path / kind
    if not folder.is_dir():
        held = ", ".join(sorted(p.name for p in Path(records.path).iterdir() if p.is_dir())) or "nothing"
        raise UserError(
            f"{records.path}: holds no {kind} (found: {held}); give prepare a source that has them, see source.format in prepare.yaml"
        )
    # What is derived from records goes to a temporary folder: caches beside them would change a user's own folder, and so its identity.
    disable_caching()
    data = load_from_disk(str(folder))
    splits = data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    if "train" not in splits:
        raise UserError(f"{folder}: has no 'train' split (found: {', '.join(splits)})")
    missing = [column for column in KINDS[kind].columns if column not in splits["train"].column_names]
    if missing:
        raise UserError(
            f"{folder}: {kind} need a column {missing[0]!r}; found {', '.join(splits['train'].column_names)}"
        )
    return DatasetDict(
        {
            split: splits[split] if split in splits else splits["train"].select([])
            for split in ("train", "validation", "test")
        }
    )
