"""What the user can mend: shown as one line, never as a traceback."""


class UserError(Exception):
    """A mistake in what the user gave: names the thing, what was found, what was expected and what to run."""
