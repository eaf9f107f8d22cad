"""What the user can mend: shown as one line, never as a traceback."""


class UserError(Exception):
    """A mistake in what the user gave: names the thing, what was found, what was expected and what to run."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback, in a notebook too."""
        return [f"error: {' '.join(str(self).split())}"]
