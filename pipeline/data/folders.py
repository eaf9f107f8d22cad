"""Find the files of a folder, and the splits that their names say. Imports no torch.

The words are those by which the hub's library reads names: `train.jsonl`, `train-00000-of-00002.parquet`,
`my_test.csv` and the files of a folder `test` all name their split.
"""

import re
from pathlib import Path
from typing import NamedTuple

from pipeline.data.files import READERS, data_suffix, find_reader
from pipeline.data.schema import SPLITS
from pipeline.errors import UserError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HELD_OUT = SPLITS[1:]

# Files beside the rows of a dataset. Another file of such a name is read if a source names it.
SIDE_FILES = re.compile(
    r"(dataset_infos?|dataset_dict|state|config|manifest)\.json|(.*\.)?quarantine\.jsonl|merged_rows\.jsonl",
    re.IGNORECASE,
)


class FileGroup(NamedTuple):
    """The files to read, each with the split that its name says, and the names that are not read."""

    files: dict[Path, str | None]
    skipped: list[str]

    def splits_of(self, file: Path) -> tuple[str, ...]:
        """Return the splits that the rows of a file may go to.

        A file that is held out is one split. The rows of the others train, or go to a split without a file.
        """
        if self.files[file] in HELD_OUT:
            return (str(self.files[file]),)
        return tuple(split for split in SPLITS if split == "train" or split not in self.files.values())

    def describe(self, split: str | None) -> list[str]:
        """Return a line on the splits, if names say any, and one on the names that are not read."""
        lines = []
        named = {name: [file for file, said in self.files.items() if said == name] for name in HELD_OUT}
        held_out = [f"{name} is {_list_files(files)}" for name, files in named.items() if files]
        if split:
            lines.append(f"read the files of split {split} alone")
        elif held_out:
            rest = ", ".join(name for name, files in named.items() if not files)
            lines.append(
                f"split by the names of its files: {', '.join(held_out)}"
                + (f"; 'splits' holds {rest} out of the others" if rest else "")
            )
        if self.skipped:
            lines.append(f"skipped {', '.join(self.skipped)}; expected {', '.join(READERS)}")
        return lines


def _list_files(files: list[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{len(files)} files"


def find_files(path: Path, split: str | None = None) -> FileGroup:
    """Return a file alone, or the files of a folder, those to train on first, of `split` only if it is given.

    Folders named like a split are read too, and `data` if the folder itself has no file of rows.
    Raises `UserError` if there is none, or if a name says two splits.
    """
    if path.is_dir():
        files, others = _find_in_folder(path)
    else:
        files, others = ([path], []) if find_reader(path) else ([], [path])
    skipped = [str(other.relative_to(path.parent if other == path else path)) for other in others]
    if not files:
        raise UserError(
            f"{path}: expected {', '.join(READERS)}, a folder of such files, "
            f"or a save_to_disk folder of datasets; found {', '.join(skipped[:5]) or 'nothing'}"
        )

    split_of = {file: _named_split(file.relative_to(path)) for file in files if file != path} or {path: None}
    if split:
        named = [name for name in SPLITS if name in split_of.values()]
        split_of = {file: name for file, name in split_of.items() if name == split}
        if not split_of:
            raise UserError(
                f"{path}: no file is named {split!r}, found {', '.join(named) or 'no split'}; "
                "check 'split' of the source"
            )
    ordered = sorted(split_of, key=lambda file: (SPLITS.index(split_of[file] or "train"), file))
    return FileGroup({file: split_of[file] for file in ordered}, skipped)


def _find_in_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return (files of rows, other paths) of a folder."""
    files: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.glob("[!.]*")):
        if path.is_dir() and _named_split(Path(path.name)):
            inner_files, inner_others = _find_in_folder(path)
            files += inner_files
            others += inner_others
        elif path.is_file() and data_suffix(path) in READERS and not SIDE_FILES.fullmatch(path.name):
            files.append(path)
        else:
            others.append(path)

    inner = folder / "data"
    if not files and inner.is_dir():
        files, inner_others = _find_in_folder(inner)
        others = [path for path in others if path != inner] + inner_others
    return files, others


def _named_split(name: Path) -> str | None:
    """Return the split that the words of a relative path say. Raises `UserError` if they say two."""
    words = re.split(r"[^a-z]+", str(name.with_suffix("")).lower())
    splits = [split for split, said in SPLIT_WORDS.items() if set(said) & set(words)]
    if len(splits) > 1:
        raise UserError(
            f"{name}: its name says {' and '.join(splits)}; rename it, or give each file as its own source"
        )
    return splits[0] if splits else None
