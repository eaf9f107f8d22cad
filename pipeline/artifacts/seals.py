"""Seals of folders that a resumed run relies on: checkpoints, `best/`, `policies/step-N`. Imports no torch.

A sealed folder contains `checkpoint.json` with the name, size and SHA-256 of each of its files. It is written
last, when everything else is on disk. A folder without a seal, or with any file missing, added, cut or
changed, does not count. Hidden files are not content.
"""

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import hash_file, list_files, read_json, sync_to_disk, write_json

SEAL = "checkpoint.json"
PREFIX = "checkpoint-"  # of the folders in which the Trainer saves: checkpoint-<step>

Entry = list[Any]  # [size in bytes, SHA-256]


def seal_folder(folder: Path, step: int, beside: Sequence[Path] = ()) -> None:
    """Flush the folder to disk, and then write its seal.

    `beside` are files outside that the folder relies on, such as the samples of earlier evaluations. They are
    recorded by their path from the folder's parent.
    """
    files = {name: file for name, file in list_files(folder).items() if name != SEAL}
    outside = {file.relative_to(folder.parent).as_posix(): file for file in beside}
    sync_to_disk(*folder.rglob("*"), folder, *outside.values())

    temporary = folder / f".{SEAL}"
    write_json(temporary, {"step": step, "files": _describe(files), "beside": _describe(outside)})
    sync_to_disk(temporary)
    os.replace(temporary, folder / SEAL)
    sync_to_disk(folder, folder.parent)


def find_damage(folder: Path) -> str | None:
    """Return in words how a folder differs from its seal, or None if it is whole.

    Raises `OSError` if a file is there and cannot be read.
    """
    try:
        (folder / SEAL).read_bytes()
    except FileNotFoundError:
        return "it was not completely written"
    seal = read_seal(folder)
    if not seal:
        return f"{SEAL} was altered"
    if damage := find_resized(folder):
        return damage
    files = list_files(folder)
    changed = _differing(seal["files"], {name: files[name] for name in seal["files"]})
    if changed:
        return f"{changed} was altered"
    return _find_damage_beside(folder, seal)


def find_resized(folder: Path) -> str | None:
    """Return which file of a sealed folder is missing, added or of another size; None if there is none."""
    expected = read_seal(folder).get("files", {})
    sizes = {name: file.stat().st_size for name, file in list_files(folder).items() if name != SEAL}
    if missing := sorted(expected.keys() - sizes.keys()):
        return f"{missing[0]} is missing"
    if added := sorted(sizes.keys() - expected.keys()):
        return f"{added[0]} was added"
    changed = [name for name, (size, _) in sorted(expected.items()) if sizes[name] != size]
    return (
        f"{changed[0]} has {sizes[changed[0]]:,} bytes, not {expected[changed[0]][0]:,}" if changed else None
    )


def read_seal(folder: Path) -> dict[str, Any]:
    """Return the seal of a folder, or {} if there is none or it has another form."""
    seal = read_json(folder / SEAL)
    entries = [seal.get("files"), seal.get("beside")]
    is_valid = type(seal.get("step")) is int and all(
        isinstance(part, dict) and all(map(_is_entry, part.values())) for part in entries
    )
    return seal if is_valid else {}


def list_checkpoints(work: Path) -> dict[int, Path]:
    """Return the Trainer's checkpoint folders by step, oldest first, sealed or not."""
    folders = {folder.name.removeprefix(PREFIX): folder for folder in work.glob(f"{PREFIX}*")}
    return {int(step): folders[step] for step in sorted(filter(str.isdecimal, folders), key=int)}


def sealed_steps(work: Path) -> list[int]:
    """Return the steps of the sealed checkpoints of which no file has another size, oldest first."""
    return [
        step
        for step, folder in list_checkpoints(work).items()
        if read_seal(folder) and not find_resized(folder)
    ]


def replace_folder(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; after a crash in here, `restore_folder` recovers one of the two."""
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Move a folder back that a crash of `replace_folder` left without its name."""
    if _old(folder).is_dir() and not folder.exists():
        os.rename(_old(folder), folder)


def delete_sealed(folder: Path) -> None:
    """Delete a folder, its seal first, so that half of it never counts."""
    (folder / SEAL).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _find_damage_beside(folder: Path, seal: dict[str, Any]) -> str | None:
    """Check the recorded files outside the folder, and the sealed folders among them."""
    for name, entry in seal["beside"].items():
        file = folder.parent / name
        if file.name != SEAL:
            if _differing({name: entry}, {name: file}):
                return f"{name} beside it is missing or was altered"
            continue
        restore_folder(file.parent)
        # A later evaluation may have replaced it. The resumed run then does that again.
        is_later = read_seal(file.parent).get("step", -1) > seal["step"]
        if (not is_later and _differing({name: entry}, {name: file})) or find_damage(file.parent):
            return f"{file.parent.name} beside it is missing or was altered"
    return None


def _describe(files: dict[str, Path]) -> dict[str, Entry]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
        hashes = pool.map(hash_file, files.values())
        return {
            name: [file.stat().st_size, digest]
            for (name, file), digest in zip(files.items(), hashes, strict=True)
        }


def _differing(expected: dict[str, Entry], files: dict[str, Path]) -> str | None:
    """Return the first name whose file is missing or differs from its entry."""
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        return missing[0]
    entries = _describe(files)
    return next((name for name in expected if entries[name] != expected[name]), None)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(value) for value in entry] == [int, str]


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
