"""Import the functions that a config names as `module:function`. Imports no torch."""

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

from pipeline.errors import UserError, one_line


def import_function(spec: str, expected: str) -> Callable[..., Any]:
    """Import the function named `module:function`; `expected` is its signature, for errors.

    The module may be in the working folder, which is searched last: there it hides no library. Raises
    `UserError` if there is no such function.
    """
    module, _, name = spec.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{spec}: {error}; expected module:function in the working folder or on the Python path"
        ) from error
    except Exception as error:  # the module is the user's code
        raise UserError(f"{spec}: cannot be imported: {describe_failure(error)}") from error
    if not callable(function):
        raise UserError(f"{spec}: is a {type(function).__name__}, expected a function {expected}")
    return function  # type: ignore[no-any-return]


def describe_failure(error: BaseException, file: str | None = None) -> str:
    """Return the type, message and place of an error: its last line in `file`, if it was there."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    place, line = ([place for place in places if place[0] == file] or places)[-1]
    if isinstance(error, SyntaxError):
        place, line = error.filename or place, error.lineno or line
    return f"{type(error).__name__}: {one_line(error)}, at {place}, line {line}"
