"""The command line: argv in, an exit code out. Arguments and configs are checked before torch is imported.

Exit codes: 0 done; 1 the machine failed (full disk, unreadable file) or a library; 2 a user's mistake; 130
stopped by Ctrl-C; 143 stopped by SIGTERM, which clusters send.
"""

import argparse
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from pipeline.cli.commands import COMMANDS, run_stage
from pipeline.cli.parser import parse
from pipeline.distributed.processes import destroy_process_group, is_initialized, is_main_process
from pipeline.errors import Stopped, UserError, as_line, modules_of, one_line

STAGE_MODULE = re.compile(r"pipeline\.\w+\.stage")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = argparse.Namespace(command="rlhf", debug=False)
    try:
        args = parse(argv)
        with _raise_on_signals():
            COMMANDS.get(args.command, run_stage)(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        if args.debug or _is_bug(error):
            raise
        message, code = _explain(error, args.command)
        if is_main_process() or is_initialized():  # earlier, all ranks meet the same error
            is_stopped = isinstance(error, KeyboardInterrupt)
            print(f"{'' if is_stopped else 'error: '}{as_line(message)}", file=sys.stderr)
        return code


def entry(argv: Sequence[str] | None = None) -> None:
    """Run the console script, and leave with its exit code."""
    if isinstance(sys.stdout, TextIOWrapper):  # names of files and columns may not be Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(argv)
    except KeyboardInterrupt:  # it came before or after the command itself
        if "--debug" in (argv or sys.argv):
            raise
        code = 128 + signal.SIGINT
    if code == 0:  # after a failure, other ranks may no longer be there to leave the group with
        destroy_process_group()
    sys.exit(code)


@contextmanager
def _raise_on_signals() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM in this block, as Python raises `KeyboardInterrupt` on Ctrl-C.

    Python drops either if it is raised while an object is deleted. It is then raised again a moment later.
    """

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_again(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            hook(dropped)
            return
        number = getattr(dropped.exc_value, "number", signal.SIGINT)
        main = threading.main_thread().ident
        threading.Timer(0.01, signal.pthread_kill, [main, number]).start()

    before = signal.signal(signal.SIGTERM, stop)
    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook


def _is_bug(error: BaseException) -> bool:
    """Return whether this package itself failed. Errors of libraries come from data, settings or the machine.

    Running out of memory is no bug, whoever asked for it.
    """
    if isinstance(error, UserError | KeyboardInterrupt | OSError | MemoryError) or _is_disk_full(error):
        return False
    return type(error).__name__ != "OutOfMemoryError" and modules_of(error)[-1].split(".")[0] == "pipeline"


def _explain(error: BaseException, command: str) -> tuple[str, int]:
    """Return the error in one line, and its exit code."""
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        return "; ".join(
            filter(None, [f"stopped by {signal.Signals(number).name}", str(error)])
        ), 128 + number
    if _is_disk_full(error):
        filename = getattr(error, "filename", None)
        place = f" for {filename}" if filename else ""
        return f"no space left on the disk{place}; free some and run the same command again", 1
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or one_line(error)}", 1
    if isinstance(error, UserError):
        return one_line(error), 2
    stages = [module.split(".")[1] for module in modules_of(error) if STAGE_MODULE.fullmatch(module)]
    where = stages[0] if stages else command
    return f"{where}: {type(error).__name__}: {one_line(error)}; add --debug for the traceback", 1


def _is_disk_full(error: BaseException) -> bool:
    """Return whether the disk is full; safetensors says so only in its message."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
