"""User errors, printed as one line without a traceback."""


class UserError(Exception):
    """A mistake in the user's input: names the thing, what was found, what was expected and what to run."""

    def _render_traceback_(self) -> list[str]:
        """Return the line that IPython prints instead of a traceback, in notebooks too."""
        return [f"error: {' '.join(str(self).split())}"]
