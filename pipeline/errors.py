"""User errors, printed as one line without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the user's input: names the thing, what was found, what was expected and what to run."""

    def _render_traceback_(self) -> list[str]:
        """Return the line that IPython prints instead of a traceback, in notebooks too."""
        return [f"error: {' '.join(str(self).split())}"]


@contextmanager
def explain_row(row: str) -> Iterator[None]:
    """Begin the message of a `UserError` in this block with the row that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{row}: {error}") from error
