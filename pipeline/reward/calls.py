"""Call reward functions: copies go in, finite rewards of each response come out, and errors name their line.

A function is the user's own code. It gets copies, so that what it changes is not what is trained on.
It is called as TRL calls it: a response to a prompt of messages is a list with one message of the assistant,
a function may be `async`, and None is no reward for a response.
"""

import copy
import inspect
import logging
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.config.importing import describe_failure
from pipeline.errors import UserError, one_line
from pipeline.reward.awaiting import await_all, close_all
from pipeline.reward.named import NamedReward, prefix_label
from pipeline.reward.token_rewards import (
    FINITE,
    StepRewards,
    as_number,
    check_steps,
    place_rewards,
    quote,
    total_reward,
)

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[Any]]
ResponseReward = float | list[float]  # of the whole response, or of each of its tokens

OF_TRAINERS: dict[str, Any] = {  # what TRL's trainers add for functions that name it -> without a trainer
    "trainer_state": None,
    "log_extra": lambda column, values: None,
    "log_metric": lambda name, value: None,
}
OWN_MODULES = ("pipeline.reward.", "pipeline.ppo.")  # an error there is no error of the user's function
EXTRAS = {"math_verify": "math"}  # package that an error of an import names -> extra that brings it


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
    per token, `StepRewards`, or None. The policy's `tokenizer` places the rewards of steps on tokens; without
    one they become their sum. None, no reward for this response, counts 0, which is logged once.

    Raises `UserError` if the function fails or returns anything else, or if a number or the sum of a response
    is not finite in fp32.
    """
    batch = (prompts, completions, completion_ids, ended, columns, tokenizer)
    [rewards] = call_reward_functions([function], *batch)
    if None in rewards:
        _warn_of_none(reward_name(function))
    return [0.0 if reward is None else reward for reward in rewards]


def call_reward_functions(
    functions: Sequence[RewardFunction],
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    ended: Sequence[bool],
    columns: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[ResponseReward | None]]:
    """Return the rewards of each function as `call_reward_function` does, with None for no reward.

    `async` functions run concurrently, after the others.
    """
    batch = (prompts, completions, completion_ids, ended, columns)
    returned: list[Any] = []
    try:
        for function in functions:
            kwargs = _build_kwargs(function, *batch)
            with _explain_failure(function, kwargs):
                returned.append(function(**kwargs))
    except BaseException:
        close_all(returned)
        raise

    rewards = []
    for function, value in zip(functions, await_all(returned), strict=True):
        if isinstance(value, BaseException):
            with _explain_failure(function, _build_kwargs(function, *batch)):
                raise value
        rewards.append(_read_entries(reward_name(function), value, tokenizer, batch))
    return rewards


def _build_kwargs(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    ended: Sequence[bool],
    columns: dict[str, Any],
) -> dict[str, Any]:
    """Return what a function is called with: copies, and the arguments of TRL's trainers that it names."""
    rows = zip(prompts, completions, strict=True)
    kwargs: dict[str, Any] = {
        "prompts": copy.deepcopy(list(prompts)),
        "completions": [_as_completion(function, *row) for row in rows],
        "completion_ids": [list(ids) for ids in completion_ids],
        "ended": list(ended),
    }
    known = kwargs.keys() | OF_TRAINERS.keys()
    kwargs |= copy.deepcopy({name: column for name, column in columns.items() if name not in known})
    of_trainer = OF_TRAINERS | {name: columns[name] for name in OF_TRAINERS if name in columns}
    if not is_own(function):
        of_trainer = {name: of_trainer[name] for name in of_trainer if name in _parameters(function)}
    return kwargs | of_trainer


def _as_completion(function: RewardFunction, prompt: Any, text: str) -> Any:
    """Return a response as the function gets it: as messages if the prompt has messages, else as text.

    The functions of `trl.rewards` read messages alone; this package's own read texts alone.
    """
    has_messages = isinstance(prompt, list) or is_of_trl(function)
    return [{"role": "assistant", "content": text}] if has_messages and not is_own(function) else text


def is_own(function: Any) -> bool:
    """Return whether a function is part of this package's training, such as the score of a reward model."""
    return function_name(function).startswith(OWN_MODULES)


def is_of_trl(function: Any) -> bool:
    """Return whether a function is of `trl.rewards`, or was made by one of these."""
    return function_name(function).startswith("trl.rewards")


def _parameters(function: Any) -> Collection[str]:
    """Return the names of a function's parameters; none if it does not tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()


@contextmanager
def _explain_failure(function: RewardFunction, kwargs: Iterable[str]) -> Iterator[None]:
    """Turn an error of the user's function into a `UserError` that names the reward and its arguments."""
    name = reward_name(function)
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError) and isinstance(function, NamedReward):
            raise UserError(prefix_label(name, str(error))) from error
        if is_own(function):
            raise
        if isinstance(error, UserError):  # of this package, which the function calls
            raise UserError(f"{name}: {error}") from error
        if hint := install_hint(error):
            raise UserError(f"{name}: {one_line(error)}; {hint}") from error
        problem = f"the reward failed with {describe_failure(error, _source_file(function))}"
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        if set(frames) == {__file__}:  # it was not entered
            problem = f"the reward cannot be called: {one_line(error)}"
        raise UserError(f"{name}: {problem}; it is called with {', '.join(kwargs)}") from error


@cache
def _warn_of_none(name: str) -> None:
    logger.warning("%s: returned None, no reward, for some responses; they count 0", name)


def reward_name(function: Any) -> str:
    """Return the name of a reward in errors: the label that its config gave it, or `module:name`."""
    return function.label if isinstance(function, NamedReward) else function_name(function)


def function_name(function: Any) -> str:
    """Return `module:name` of a function, as a config names it."""
    function = _unwrap(function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def install_hint(error: BaseException) -> str:
    """Return the command that installs what an import lacks, or an empty string if no extra brings it."""
    extras = [extra for package, extra in EXTRAS.items() if package in str(error)]
    return f"run pip install 'rlhf-stage[{extras[0]}]'" if extras and isinstance(error, ImportError) else ""


def _source_file(function: Any) -> str | None:
    """Return the file of a function, or of the class of a callable object."""
    function = _unwrap(function)
    called = inspect.unwrap(function) if inspect.isroutine(function) else type(function).__call__
    return getattr(getattr(called, "__code__", None), "co_filename", None)


def _unwrap(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _read_entries(
    name: str, returned: Any, tokenizer: PreTrainedTokenizerBase | None, batch: Any
) -> list[ResponseReward | None]:
    """Return what a function returned for a batch as rewards. Raises `UserError` if something is wrong."""
    prompts, completions, completion_ids = batch[:3]
    values = _as_list(name, returned, len(prompts))
    if len(values) != len(prompts):
        raise UserError(
            f"{name}: the reward returned {len(values)} scores for {len(prompts)} responses; expected as many"
        )
    rows = zip(values, prompts, completions, completion_ids, strict=True)
    return [_read_entry(name, tokenizer, *row) for row in rows]


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
) -> ResponseReward | None:
    """Return the reward of one response, or those of its tokens. Raises `UserError` if the entry is wrong."""
    number = as_number(entry)
    if number is not None or entry is None:
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
