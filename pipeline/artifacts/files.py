"""Files of artifacts: hash each file once, flush files to disk, read and write JSON, hold a lock file."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

# The user's cache folder: nothing is written next to the user's own files.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rlhf-stage", "hashes")


def hash_files(path: str | Path, *, cached: bool = True) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder by relative POSIX path, or of a single file by its name.

    Hidden files are skipped. A file whose size and mtime are in the cache is not read again. With
    `cached=False`, every file is read and the cache is renewed.
    """
    path = Path(path).absolute()
    cache = CACHE / f"{hash_value(str(path))[:16]}.json"
    known: dict[str, list[Any]] = read_json(cache)
    files = list_files(path)
    stamps = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in files.items()}

    entries = {
        name: known[name] for name, stamp in stamps.items() if cached and known.get(name, [])[:2] == stamp
    }
    unread = [name for name in files if name not in entries]
    size = sum(stamps[name][0] for name in unread)
    with progress_bar(f"hashing {path.name}", "B", total=size, unit_scale=True, delay=1) as bar:
        for name in unread:
            entries[name] = [*stamps[name], hash_file(files[name])]
            bar.update(stamps[name][0])

    if entries != known:
        with suppress(OSError):  # the cache is optional: its folder may be read-only, or the disk full
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, entries)
    return {name: str(entries[name][2]) for name in files}


def list_files(path: Path) -> dict[str, Path]:
    """Return the files in a folder by relative POSIX path, or a single file by its name.

    Hidden files are skipped, because they are never content: a download's .cache, a clone's .git.
    """
    if path.is_file():
        return {path.name: path}
    files = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
    return {
        name.as_posix(): file
        for name, file in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_value(value: Any) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync_to_disk(*paths: Path) -> None:
    """Flush files and folders to disk."""
    for path in paths:
        # Some network file systems, and Windows, cannot sync a folder.
        with suppress(OSError) if path.is_dir() else nullcontext():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file is absent, incomplete or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object to a JSON file, indented and in UTF-8.

    Raises `UserError` for a number that is not finite, which JSON does not have.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError(f"{path}: a number to write is not finite (NaN or infinite)") from None
    path.write_text(text + "\n", encoding="utf-8")


def finite_or_none(value: Any) -> Any:
    """Return plain data with None for each number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def hold_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path`, which the operating system releases if this process dies.

    Raises `UserError` with the message `busy` if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path, timeout=0).acquire()
    except Timeout:
        raise UserError(busy) from None
    with lock:
        yield
