"""Open the records that a stage needs."""

from pathlib import Path

from datasets import DatasetDict, disable_caching, load_from_disk

from pipeline.artifacts.manifest import Artifact
from pipeline.data.reward_columns import check_names
from pipeline.data.schema import KINDS, SPLITS
from pipeline.errors import UserError


def open_records(records: Artifact, kind: str) -> DatasetDict:
    """Open the records of one kind, with splits `train`, `validation` and `test`.

    Splits that an external folder lacks are empty.
    Raises `UserError` if the kind, its `train` split or one of its columns is missing, or if a column for
    reward functions has the name of one of their arguments.
    """
    folder = records.path if records.is_external else records.path / kind
    if not folder.is_dir():
        folders = ", ".join(sorted(path.name for path in Path(records.path).iterdir() if path.is_dir()))
        raise UserError(
            f"{records.path}: holds no {kind} (found: {folders or 'nothing'}); "
            "give prepare a source that has them, see source.format in prepare.yaml"
        )

    # Caches beside the records would change a user's folder, and with it the folder's identity.
    # Without caching, derived datasets go to a temporary folder.
    disable_caching()
    data = load_from_disk(str(folder))
    splits = data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    if "train" not in splits:
        raise UserError(f"{folder}: has no 'train' split (found: {', '.join(splits)})")

    columns = splits["train"].column_names
    missing = [column for column in KINDS[kind].columns if column not in columns]
    if missing:
        raise UserError(f"{folder}: {kind} need a column {missing[0]!r}; found {', '.join(columns)}")

    if KINDS[kind].keeps_columns:
        check_names(str(folder), columns, "rename or remove it")

    return DatasetDict(
        {split: splits[split] if split in splits else splits["train"].select([]) for split in SPLITS}
    )
