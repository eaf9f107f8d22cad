"""Run commands of the CLI in forked children, which have imported everything, and disturb them.

A disturbance comes after some seconds, or at the n-th change of the file system below the child's folder:
Python's audit events announce each open for writing, rename, removal and new folder. The second kind finds
the gap between two renames, and comes at the same place again.
"""

import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

TRACEBACK = "Traceback (most recent call last)"
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
GRACE_SECONDS = 10.0  # that a launcher leaves the other processes once one has failed
EVENTS = "events"  # a file with a byte for each change

Work = Callable[[], int | None]


class Signal(NamedTuple):
    """A signal from outside, to every process of the launch or to the last one alone."""

    number: int
    seconds: float
    to_all: bool = True


class AtChange(NamedTuple):
    """What a child does to itself just before its n-th change; if `lasting`, before each later one too."""

    number: int
    act: Callable[[Path], None]  # gets the path that is about to change; an error fails the change
    lasting: bool = False


class Limits(NamedTuple):
    """Limits of the operating system: open files, and the bytes of a file."""

    open_files: int | None = None
    file_bytes: int | None = None


@dataclass
class Result:
    """How a command ended. `code` is negative for a signal, and None after a timeout."""

    code: int | None
    out: str
    err: str
    seconds: float
    changes: int = 0

    @property
    def tracebacks(self) -> int:
        return self.err.count(TRACEBACK) + self.out.count(TRACEBACK)

    @property
    def errors(self) -> list[str]:
        """The lines that report an error, as the command line prints them."""
        return [line for line in self.err.splitlines() if line.startswith(("error: ", "interrupted"))]

    @property
    def is_one_line(self) -> bool:
        """Whether it failed, and says why in one line."""
        return self.code in (1, 2) and len(self.errors) == 1 and not self.tracebacks

    @property
    def is_refusal(self) -> bool:
        """Whether it is one line about a mistake of the user."""
        return self.code == 2 and self.is_one_line

    @property
    def summary(self) -> str:
        """The exit code, with the error line or the last line of a traceback."""
        if self.code is None:
            return f"had not ended after {self.seconds:.0f} s"
        lines = [line for line in self.err.splitlines() if line.strip()] or ["nothing on stderr"]
        if self.tracebacks:
            frames = [line.strip() for line in lines if line.startswith("  File ")]
            return f"exit {self.code}: {lines[-1][:200]} ({frames[-1] if frames else 'no frame'})"
        return f"exit {self.code}: {(self.errors or lines[-1:])[0][:300]}"


def run_cli(argv: Sequence[str], folder: Path, **options: Any) -> Result:
    """Run `rlhf ARGV` in `folder`; `options` are those of `run_child`."""

    from pipeline.cli import entry

    return run_child(lambda: entry(list(argv)), folder, **options)


def run_child(
    work: Work,
    folder: Path,
    *,
    processes: int = 1,
    disturbance: Signal | AtChange | None = None,
    limits: Limits | None = None,
    timeout: float = 240.0,
) -> Result:
    """Run `work` in a forked child, or in several as torchrun starts them, and return how it ended.

    The caller must not have started threads.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        captured = Path(name)
        at_change = disturbance if isinstance(disturbance, AtChange) else None
        pids = [
            _fork(work, folder, captured, variables, at_change, limits or Limits())
            for variables in _launch_variables(processes)
        ]
        try:
            code = _wait(pids, disturbance if isinstance(disturbance, Signal) else None, timeout)
        finally:
            _kill_groups(pids)
        out, err, changes = (_read(captured / name) for name in ("out", "err", EVENTS))
    return Result(code, out, err, time.monotonic() - started, len(changes))


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="backslashreplace") if file.exists() else ""


def _launch_variables(processes: int) -> list[dict[str, str]]:
    """Return the variables with which torchrun starts each process of a launch; none for one process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


# In the child


def _fork(
    work: Work,
    folder: Path,
    captured: Path,
    variables: dict[str, str],
    at_change: AtChange | None,
    limits: Limits,
) -> int:
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        _begin(folder, captured, variables)
        _watch_changes(folder, captured / EVENTS, at_change)
        _set_limits(limits)
        os.close(writable)  # a signal is meant for the work, not for what prepares it
        _end(work, bool(variables))
    os.close(writable)
    os.read(readable, 1)
    os.close(readable)
    return pid


def _begin(folder: Path, captured: Path, variables: dict[str, str]) -> None:
    """Give the child the streams, signals, variables, folder and process group that a shell would."""
    os.setpgid(0, 0)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(captured / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(variables)
    os.chdir(folder)
    sys.path.insert(0, str(folder))


def _watch_changes(folder: Path, log: Path, at_change: AtChange | None) -> None:
    """Count the changes that rank 0 makes below `folder`, and let the disturbance come in time."""
    if os.environ.get("RANK", "0") != "0":
        return
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    count, acting = 0, False

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count, acting
        if acting or (path := changed_path(event, args)) is None or folder not in path.parents:
            return
        count += 1
        os.write(descriptor, b".")
        if at_change and (count == at_change.number or (at_change.lasting and count > at_change.number)):
            acting = True  # what the disturbance changes does not count
            try:
                at_change.act(path)
            finally:
                acting = False

    sys.addaudithook(watch)


def changed_path(event: str, args: tuple[Any, ...]) -> Path | None:
    """Return the path that an audit event announces a change of, or None."""
    if event == "open":
        path, _, flags = args
        if not isinstance(flags, int) or not flags & WRITING or flags & os.O_DIRECTORY:
            return None
    elif event in CHANGES:
        path = args[0]
    else:
        return None
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    inside = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
    base = os.getcwd() if inside == -1 else os.readlink(f"/proc/self/fd/{inside}")  # as shutil.rmtree has it
    return Path(os.path.normpath(os.path.join(base, os.fsdecode(path))))


def _set_limits(limits: Limits) -> None:
    if limits.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    if limits.open_files is not None:
        in_use = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + limits.open_files,) * 2)


def _end(work: Work, is_launched: bool) -> NoReturn:
    """Call `work` and leave the process as the interpreter would, without its clean-up."""
    code: int | None = 1
    try:
        code = work()
        if is_launched:
            from pipeline.distributed.processes import destroy_process_group

            destroy_process_group()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        with suppress(BaseException):
            traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        os._exit(code or 0)


# In the parent


def _wait(pids: Sequence[int], sent: Signal | None, timeout: float) -> int | None:
    """Return the first exit code that is not 0; send the signal in time; end the others once one fails."""
    codes: dict[int, int] = {}
    started, deadline = time.monotonic(), time.monotonic() + timeout
    while running := [pid for pid in pids if pid not in codes]:
        for pid in running:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and len(pids) > 1:
                    _send(signal.SIGTERM, [other for other in pids if other not in codes])
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if sent and time.monotonic() >= started + sent.seconds:
            _send(sent.number, [pid for pid in (pids if sent.to_all else pids[-1:]) if pid not in codes])
            sent = None
        if time.monotonic() > deadline:
            left = [pid for pid in pids if pid not in codes]
            _send(signal.SIGKILL, left)
            for pid in left:
                os.waitpid(pid, 0)
            break
        time.sleep(0.003)
    return next(filter(None, codes.values()), 0 if len(codes) == len(pids) else None)


def _kill_groups(pids: Sequence[int]) -> None:
    """Kill what is left of each child's group: the processes that a killed child had started."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _send(number: int, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def scratch_copy(folder: Path, origin: Path, names: Sequence[str]) -> Any:
    """Make `folder` with copies of these files and folders of `origin`; remove it at the end."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (origin / name).is_dir() else shutil.copy2)(origin / name, folder / name)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
