"""Files of artifacts: list and hash them, flush them to disk, read and write JSON, hold a lock file.

A file that is smaller than `SMALL` is read whenever its hash is asked for. The hash of a larger one is
remembered with its size, times of modification and of change, inode and device: the time of change is set by
the system alone, so other bytes under the old size and time are seen. A folder or file that cannot be read
raises its `OSError`: it is not taken for an absent one.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import Field, TypeAdapter, ValidationError

from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

# The user's cache folder: nothing is written next to the user's own files.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rlhf-stage", "hashes")
SMALL = 2**20  # bytes
# A file that was changed within these nanoseconds may change again under the same times.
SETTLED = 2_000_000_000
LOCK_PATIENCE = 0.2  # seconds; `rlhf show` holds a lock for an instant

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Stamp = tuple[int, int, int, int, int]
CACHED = TypeAdapter(dict[str, tuple[Stamp, Digest]])


def hash_files(path: str | Path, *, cached: bool = True) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder by relative POSIX path, or of a single file by its name.

    Hidden files are skipped. With `cached=False`, every file is read and the cache is renewed.
    """
    path = Path(path).absolute()
    cache = cache_file(str(path))
    known = _read_cache(cache) if cached else {}
    files = list_files(path)
    stamps = {name: _stamp(file) for name, file in files.items()}

    entries = {
        name: known[name] for name, stamp in stamps.items() if name in known and known[name][0] == stamp
    }
    unread = [name for name in files if name not in entries]
    with progress_bar(
        f"hashing {path.name}", "B", total=sum(stamps[name][0] for name in unread), unit_scale=True, delay=1
    ) as bar:
        for name in unread:
            entries[name] = (stamps[name], hash_file(files[name]))
            bar.update(stamps[name][0])

    now = time.time_ns()
    kept = {
        name: entry for name, entry in entries.items() if entry[0][0] >= SMALL and entry[0][2] < now - SETTLED
    }
    if kept != known:
        with suppress(OSError):  # the cache is optional: its folder may be read-only, or the disk full
            cache.parent.mkdir(parents=True, exist_ok=True)
            cache.write_bytes(CACHED.dump_json(kept))
    return {name: entries[name][1] for name in files}


def cache_file(key: str) -> Path:
    """Return the file of the user's cache folder for a key."""
    return CACHE / f"{hash_value(key)[:16]}.json"


def _read_cache(cache: Path) -> dict[str, tuple[Stamp, str]]:
    with suppress(OSError, ValidationError):
        return CACHED.validate_json(cache.read_bytes(), strict=True)
    return {}


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev


def list_files(path: Path) -> dict[str, Path]:
    """Return the files in a folder by relative POSIX path, or a single file by its name.

    Hidden files are skipped, because they are never content: a download's .cache, a clone's .git. Links to
    files are followed, links to folders are not. Raises `OSError` for a folder that cannot be read.
    """
    if path.is_file():
        return {path.name: path}
    return {
        name: path / name
        for name in sorted(list_names(path), key=lambda name: Path(name).parts)
        if not is_hidden(name) and (path / name).is_file()
    }


def is_hidden(name: str) -> bool:
    """Return whether a file, or a folder that it is in, is hidden."""
    return any(part.startswith(".") for part in name.split("/"))


def list_names(path: Path) -> list[str]:
    """Return everything in a folder but folders, by relative POSIX path, hidden or not.

    A link to a folder is listed, and not followed. A folder that does not exist contains nothing. Raises
    `OSError` for one that cannot be read.
    """
    names = []
    for root, folders, files in os.walk(path, onerror=_raise_unless_missing):
        links = [name for name in folders if Path(root, name).is_symlink()]
        names += [Path(root, name).relative_to(path).as_posix() for name in (*files, *links)]
    return names


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


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
    """Return the object in a JSON file, or {} if the file is absent, incomplete or holds no object.

    Raises `OSError` if the file is there and cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
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

    Raises `UserError` with the message `busy` if another process holds it, and if `path` is something else:
    a lock file is an empty regular file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not (path.is_file() and path.stat().st_size == 0)):
        raise UserError(f"{path}: is not the lock file that is expected there; move it away")
    try:
        lock = FileLock(path, timeout=LOCK_PATIENCE).acquire()
    except Timeout:
        raise UserError(busy) from None
    with lock:
        yield
