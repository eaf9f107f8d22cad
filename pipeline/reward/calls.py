"""Call a reward function: copies go in, one finite number per response comes out, and errors name their line.

The function is the user's own code. It gets copies, so that what it changes is not what is trained on.
"""

import copy
import inspect
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch

from pipeline.errors import UserError, one_line

RewardFunction = Callable[..., Sequence[float]]

ARGUMENTS = ("prompts", "completions", "completion_ids", "ended")
LARGEST = torch.finfo(torch.float32).max  # scores become fp32
MAX_QUOTED = 200  # characters of a text in an error
OWN_MODULES = ("pipeline.reward.", "pipeline.ppo.")  # an error there is no error of the user's function


def call_reward_function(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    ended: Sequence[bool],
    columns: dict[str, Any],
) -> list[float]:
    """Return the scores of a function, one for each response.

    It may return a list or a tuple of numbers, or a one-dimensional array or tensor. Raises `UserError` if it
    fails, or returns anything else than one number for each response that is finite in fp32.
    """
    kwargs = copy.deepcopy(columns) | {
        "prompts": copy.deepcopy(list(prompts)),
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
        "ended": list(ended),
    }
    try:
        returned = function(**kwargs)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if str(getattr(function, "__module__", "")).startswith(OWN_MODULES):
            raise
        names = ", ".join([*ARGUMENTS, *columns])
        problem = f"the reward failed with {describe_failure(error, _source_file(function))}"
        if len(list(traceback.walk_tb(error.__traceback__))) == 1:  # it was not entered
            problem = f"the reward cannot be called: {one_line(error)}"
        raise UserError(f"{function_name(function)}: {problem}; it is called with {names}") from error

    name = function_name(function)
    values = _as_list(name, returned, len(prompts))
    if len(values) != len(prompts):
        raise UserError(
            f"{name}: the reward returned {len(values)} scores for {len(prompts)} responses; expected as many"
        )
    return [_as_score(name, *row) for row in zip(values, prompts, completions, strict=True)]


def function_name(function: Any) -> str:
    """Return `module:name` of a function, as a config names it."""
    function = _unwrap(function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def describe_failure(error: BaseException, file: str | None = None) -> str:
    """Return the type, message and place of an error: its last line in `file`, if it was there."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    place, line = ([place for place in places if place[0] == file] or places)[-1]
    if isinstance(error, SyntaxError):
        place, line = error.filename or place, error.lineno or line
    return f"{type(error).__name__}: {one_line(error)}, at {place}, line {line}"


def _source_file(function: Any) -> str | None:
    """Return the file of a function, or of the class of a callable object."""
    function = _unwrap(function)
    called = inspect.unwrap(function) if inspect.isroutine(function) else type(function).__call__
    return getattr(getattr(called, "__code__", None), "co_filename", None)


def _unwrap(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _as_list(name: str, returned: Any, rows: int) -> Sequence[Any]:
    """Return a list, tuple, array or tensor of one dimension as a sequence. Raises `UserError` for others."""
    if getattr(returned, "ndim", None) == 1 and hasattr(returned, "tolist"):
        values: list[Any] = returned.tolist()
        return values
    if isinstance(returned, Sequence) and not isinstance(returned, str | bytes | bytearray | memoryview):
        return returned
    shape = f" of shape {tuple(returned.shape)}" if hasattr(returned, "shape") else ""
    raise UserError(
        f"{name}: the reward returned a {type(returned).__name__}{shape}; expected a list of {rows} numbers"
    )


def _as_score(name: str, value: Any, prompt: Any, completion: str) -> float:
    """Return one score as a float; True counts 1. Raises `UserError` if it is no number, or not finite."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, Real) and -LARGEST <= value <= LARGEST:  # type: ignore[operator]
        return float(value)
    texts = [_quote(text) for text in (completion, prompt)]
    found = str(value) if isinstance(value, float) else f"{_quote(value)}, a {type(value).__name__}"
    raise UserError(
        f"{name}: the reward of the response {texts[0]} to {texts[1]} is {found}; "
        "expected a finite number of at most 3.4e38"
    )


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"
