"""A griffe extension: show the doctest examples of docstrings as code."""

import re
from typing import Any

from griffe import Extension

EXAMPLES = re.compile(r"^>>> .*?(?=\n\s*\n(?!>>>)|\Z)", re.M | re.S)


class Doctests(Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Put a fence around each group of examples."""
        if obj.docstring:
            obj.docstring.value = EXAMPLES.sub(
                lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value
            )
