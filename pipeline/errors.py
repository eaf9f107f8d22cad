"""User errors, printed as one line without a traceback; signals; and where an error comes from."""

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the user's input: names the thing, what was found, what was expected and what to run."""

    def _render_traceback_(self) -> list[str]:
        """Return the line that IPython prints instead of a traceback, in notebooks too."""
        return [f"error: {one_line(self)}"]


class Stopped(KeyboardInterrupt):
    """Stopped by a signal, such as SIGTERM; the message says how to go on, if that is known."""

    def __init__(self, number: int = signal.SIGINT, message: str = ""):
        super().__init__(message)
        self.number = number


@contextmanager
def explain_row(row: str) -> Iterator[None]:
    """Begin the message of a `UserError` in this block with the row that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{row}: {error}") from error


def one_line(error: BaseException) -> str:
    """Return the whole message of an error on one line; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def modules_of(error: BaseException) -> list[str]:
    """Return the modules that an error passed through, from the outermost to the one that raised it."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]


def passed_through(error: BaseException, function: str) -> bool:
    """Return whether an error was raised during a call of a function of this name."""
    return any(frame.f_code.co_name == function for frame, _ in traceback.walk_tb(error.__traceback__))
