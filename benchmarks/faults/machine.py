"""The machine fails a command: one line, nothing published is touched, and the same command then ends.

A full and a read-only disk are real where a file system can be mounted. Elsewhere, and for other errors, each
change of the file system fails from a chosen one on.
"""

import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.faults.cases import Case, Outcome, Section
from benchmarks.faults.processes import AtChange, Limits, run_cli, scratch_copy
from benchmarks.faults.world import COMMANDS, OUTPUTS, RUN, World, contents_of, expect_same, files_in

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.EDQUOT)
FULL, READ_ONLY, REMOVED = "a full disk", "a read-only disk", "the partial folder removed"
FILE_SIZE, OPEN_FILES = "a limit of the size of files", "a limit of open files"
ROOM_BYTES = (2**13, 2**17, 2**20)  # that a full disk has at most


def plan(world: World) -> list[tuple[str, Any]]:
    """Every command with every fault of the machine, over an artifact that is there already or not."""
    faults = [FULL, READ_ONLY, FILE_SIZE, OPEN_FILES, REMOVED, *ERRORS]
    return list(product(COMMANDS, faults))


def run(case: Case) -> Outcome:
    """Let the machine fail a command; then repair it and give the command again."""
    command, fault = case.what
    reference = case.world.reference(command)
    force = case.random.random() < 0.5
    argv = [*COMMANDS[command], *(["--force"] if force else [])]
    name = os.strerror(fault) if isinstance(fault, int) else fault
    outcome = Outcome(f"rlhf {' '.join(argv)} ({name})")
    names = [*case.world.needs(command), *([OUTPUTS[command]] if force else [])]
    with (
        scratch_copy(case.folder, case.world.folder, names) as scratch,
        _disk(scratch, fault, case) as folder,
    ):
        before = published(folder)
        options = _options(fault, folder, command, case)
        result = outcome.saw(run_cli(argv, folder, **options))
        done = result.code == 0 and (folder / OUTPUTS[command]).exists()  # before, or in spite of the fault
        if not result.tracebacks:
            outcome.expect(done or result.is_one_line, f"{name}: {result.summary}")
        if not done:
            _expect_untouched(outcome, before, published(folder))
        _mend(folder, fault)
        again = outcome.saw(run_cli(argv, folder))
        if outcome.expect(again.code == 0, f"after {name}, the same command again: {again.summary}"):
            expect_same(outcome, folder / OUTPUTS[command], reference.identity)
        left = files_in(folder) - files_in(case.world.folder)
        outcome.expect(not left, f"left for good after {name}: {', '.join(sorted(left)[:4])}")
    outcome.figures["failed"] += not done
    outcome.figures["recovered"] += not done and not outcome.problems
    return outcome


def published(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all finished files; an artifact that is set aside until it is replaced is one."""
    aside = re.compile(r"/\.([\w-]+)\.partial/old/")
    files = {aside.sub(r"/\1/", name): data for name, data in contents_of(folder).items()}
    return {name: data for name, data in files.items() if not re.search(r"(^|/)\.", name)}


def _expect_untouched(outcome: Outcome, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    changed = [name for name, data in before.items() if after.get(name) != data]
    outcome.expect(not changed, f"what was there before has changed: {', '.join(sorted(changed)[:3])}")


def _options(fault: Any, folder: Path, command: str, case: Case) -> dict[str, Any]:
    """Return how `run_cli` lets the fault happen."""
    rng, changes = case.random, case.world.reference(command).changes
    if fault == FILE_SIZE:
        return {"limits": Limits(file_bytes=rng.randint(4_000, 60_000))}
    if fault == OPEN_FILES:
        return {"limits": Limits(open_files=rng.randint(0, 12))}
    number = rng.randint(1, changes)
    if fault == REMOVED:
        partial = folder / RUN / f".{command}.partial"
        return {"disturbance": AtChange(number, lambda _: shutil.rmtree(partial, ignore_errors=True))}
    if isinstance(fault, int):
        return {"disturbance": AtChange(number, lambda path: _fail(fault, path), lasting=True)}
    if not can_mount():
        code = errno.EROFS if fault == READ_ONLY else errno.ENOSPC
        return {"disturbance": AtChange(number, lambda path: _fail(code, path), lasting=True)}
    return {}


def _fail(code: int, path: Path) -> None:
    raise OSError(code, os.strerror(code), str(path))


@cache
def can_mount() -> bool:
    """Return whether this user can mount a file system in memory."""
    with tempfile.TemporaryDirectory() as name:
        return _mount("-t", "tmpfs", "-o", "size=1m", "faults", name) and _unmount(Path(name))


def _mount(*arguments: str) -> bool:
    return (
        bool(shutil.which("mount"))
        and not subprocess.run(["mount", *arguments], capture_output=True).returncode
    )


def _unmount(folder: Path) -> bool:
    return not subprocess.run(["umount", "--lazy", str(folder)], capture_output=True).returncode


@contextmanager
def _disk(scratch: Path, fault: Any, case: Case) -> Iterator[Path]:
    """Give the folder in which the command runs: on a disk of its own if the fault needs one."""
    if fault not in (FULL, READ_ONLY) or not can_mount():
        yield scratch
        return
    disk = scratch.with_name(f"{scratch.name}-disk")
    disk.mkdir()
    _mount("-t", "tmpfs", "-o", "size=256m", "faults", str(disk))
    try:
        shutil.copytree(scratch, disk, dirs_exist_ok=True)
        room = shutil.disk_usage(disk).used + case.random.randrange(case.random.choice(ROOM_BYTES))
        _mount("-o", f"remount,size={room}" if fault == FULL else "remount,ro", str(disk))
        yield disk
    finally:
        _unmount(disk)
        disk.rmdir()


def _mend(folder: Path, fault: Any) -> None:
    """Make room on a full disk, and let a read-only one be written."""
    if fault in (FULL, READ_ONLY) and can_mount():
        _mount("-o", "remount,rw,size=256m", str(folder))


SECTION = Section(
    "machine", plan, run, "{failed} commands failed by the machine, {recovered} recovered", full=150, short=14
)
