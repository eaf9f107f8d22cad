"""User errors, printed as one line without a traceback; signals; where an error comes from; safe text."""

import re
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

# Escape sequences of a terminal: with an end of their own (OSC, DCS, …), with parameters (CSI), and others.
ESCAPES = re.compile(
    r"\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?|\x1b[ -/]*[0-~]?"
)
# Other controls but tab and line feed, and marks that reorder text. Half a surrogate pair cannot be printed.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(0x7F, 0xA0)])
REORDERING = dict.fromkeys([0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)])
SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")
UNPRINTABLE = CONTROLS | REORDERING | SURROGATES


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


def printable(text: str) -> str:
    """Return text without what could move the cursor, colour, hide or reorder what a terminal shows.

    Messages contain text from data, servers and models. Line feeds and tabs remain.
    """
    return ESCAPES.sub("", text).translate(UNPRINTABLE)


def as_line(text: str) -> str:
    """Return text that is safe to print, on one line."""
    words = " ".join(ESCAPES.sub("", text).split())  # some controls are white space
    return " ".join(words.translate(UNPRINTABLE).split())


def one_line(error: BaseException) -> str:
    """Return the whole message of an error on one line; its type if it has none."""
    return as_line(str(error)) or type(error).__name__


def modules_of(error: BaseException) -> list[str]:
    """Return the modules that an error passed through, from the outermost to the one that raised it."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]


def passed_through(error: BaseException, function: str) -> bool:
    """Return whether an error was raised during a call of a function of this name."""
    return any(frame.f_code.co_name == function for frame, _ in traceback.walk_tb(error.__traceback__))
