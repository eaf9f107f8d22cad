"""Call a reward function: copies go in, finite rewards of each response come out, and errors name their line.

The function is the user's own code. It gets copies, so that what it changes is not what is trained on.
"""

import copy
import inspect
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError, one_line
from pipeline.reward.token_rewards import (
    FINITE,
    StepRewards,
    as_number,
    check_steps,
    place_rewards,
    quote,
    total_reward,
)

RewardFunction = Callable[..., Sequence[Any]]
ResponseReward = float | list[float]  # of the whole response, or of each of its tokens

ARGUMENTS = ("prompts", "completions", "completion_ids", "ended")
OWN_MODULES = ("pipeline.reward.", "pipeline.ppo.")  # an error there is no error of the user's function


def call_reward_function(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    ended: Sequence[bool],
    columns: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[ResponseReward]:
    """Return the rewards of a function: for each response one number, or one per token of `completion_ids`.

    The function may return a list, a tuple, an array or a tensor. Each entry is a number, a row of one number
    per token, or `StepRewards`, which the policy's `tokenizer` places on tokens; without one they become
    their sum. Raises `UserError` if the function fails or returns anything else, or if a number or the sum of
    a response is not finite in fp32.
    """
    kwargs = copy.deepcopy(columns) | {
        "prompts": copy.deepcopy(list(prompts)),
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
        "ended": list(ended),
    }
    try:
        returned = function(**kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if str(getattr(function, "__module__", "")).startswith(OWN_MODULES):
            raise
        if isinstance(error, UserError):  # of this package, which the function calls
            raise UserError(f"{function_name(function)}: {error}") from error
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
    rows = zip(values, prompts, completions, completion_ids, strict=True)
    return [_read_entry(name, tokenizer, *row) for row in rows]


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
    """Return a list, a tuple, or an array or tensor of one or two dimensions as a sequence.

    Raises `UserError` for others.
    """
    if getattr(returned, "ndim", None) in (1, 2) and hasattr(returned, "tolist"):
        values: list[Any] = returned.tolist()
        return values
    if isinstance(returned, Sequence) and not isinstance(
        returned, str | bytes | bytearray | memoryview | StepRewards
    ):
        return returned
    shape = f" of shape {tuple(returned.shape)}" if hasattr(returned, "shape") else ""
    raise UserError(
        f"{name}: the reward returned a {type(returned).__name__}{shape}; expected a list of {rows} numbers"
    )


def _read_entry(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    entry: Any,
    prompt: Any,
    completion: str,
    ids: Sequence[int],
) -> ResponseReward:
    """Return the reward of one response, or those of its tokens. Raises `UserError` if the entry is wrong."""
    number = as_number(entry)
    if number is not None:
        return number
    response = f"the response {quote(completion)} to {quote(prompt)}"
    try:
        if isinstance(entry, StepRewards):
            reward = _read_steps(tokenizer, entry, completion, ids)
        else:
            reward = _read_tokens(entry, len(ids), response)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    if as_number(total_reward(reward)) is None:
        raise UserError(f"{name}: the rewards of {response} sum to {total_reward(reward)}; expected {FINITE}")
    return reward


def _read_steps(
    tokenizer: PreTrainedTokenizerBase | None, entry: StepRewards, completion: str, ids: Sequence[int]
) -> ResponseReward:
    """Return the rewards of steps on their tokens, or their sum without a tokenizer."""
    if tokenizer is None:
        return total_reward(check_steps(completion, entry.ends, entry.rewards)[1])
    return place_rewards(tokenizer, ids, completion, entry.ends, entry.rewards)


def _read_tokens(entry: Any, tokens: int, response: str) -> list[float]:
    """Return one float per token."""
    if getattr(entry, "ndim", None) in (0, 1) and hasattr(entry, "tolist"):
        entry = entry.tolist()
    if not isinstance(entry, list | tuple):
        shown = str(entry) if isinstance(entry, float) else f"{quote(entry)}, a {type(entry).__name__}"
        raise UserError(f"the reward of {response} is {shown}; expected {FINITE}")
    if len(entry) != tokens:
        raise UserError(
            f"the reward of {response} has {len(entry)} numbers for {tokens} tokens; expected one number, or "
            "one per token of its completion_ids"
        )
    numbers = []
    for index, value in enumerate(entry, 1):
        number = as_number(value)
        if number is None:
            raise UserError(
                f"the reward of token {index} of {tokens} of {response} is {quote(value)}; expected {FINITE}"
            )
        numbers.append(number)
    return numbers
