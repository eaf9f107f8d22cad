"""Open the functions of a config: `module:function`, or what such a function makes of `arguments`."""

import inspect
from typing import Any

from pipeline.config import FunctionSection, Reward, importing
from pipeline.config.importing import describe_failure
from pipeline.errors import UserError, one_line
from pipeline.reward.calls import RewardFunction, install_hint, is_of_trl
from pipeline.reward.named import explain_reward, label_reward, name_reward

EMPTY_BATCH = ("prompts", "completions", "completion_ids", "solution")  # what functions of trl.rewards read


def open_function(key: str, section: FunctionSection | Reward) -> RewardFunction:
    """Return the function at `key` of a config; errors of its calls begin with the key and the source.

    Raises `UserError` if it cannot be imported or made, or if a function of TRL lacks a package.
    """
    label = label_reward(key, section.source)
    with explain_reward(label):
        function = import_function(section.source)
        if section.arguments is not None:
            function = make_function(function, section.arguments)
        if is_of_trl(function):
            _check_packages(function)
    return name_reward(function, label)


def import_function(spec: str) -> RewardFunction:
    """Import the reward function named `module:function`. Raises `UserError` if there is no such function."""
    return importing.import_function(spec, "(prompts, completions, **columns) -> list of float")


def make_function(factory: RewardFunction, arguments: dict[str, Any]) -> RewardFunction:
    """Return the reward function that `factory` makes of the arguments.

    Raises `UserError` if it does not take them, fails, or returns something else.
    """
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # it does not tell
        signature = inspect.Signature([inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)])
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"arguments: {error}; it takes {', '.join(signature.parameters) or 'none'}") from None
    try:
        function = factory(**arguments)
    except Exception as error:  # the user's code
        raise UserError(f"arguments: it failed with {describe_failure(error)}") from error
    if not callable(function):
        raise UserError(
            f"arguments: with them it returned a {type(function).__name__}, expected a reward function; "
            "remove 'arguments' if it is the reward function itself"
        )
    return function  # type: ignore[no-any-return]


def _check_packages(function: RewardFunction) -> None:
    """Call a function of `trl.rewards` without rows: it imports what it needs only when it is called."""
    try:
        function(**{name: [] for name in EMPTY_BATCH})
    except ImportError as error:
        raise UserError(f"{one_line(error)}; {install_hint(error) or 'install it'}") from None
    except TypeError as error:
        raise UserError(
            f"is no reward function: {error}; if it makes one, give its arguments: "
            "{source: …, arguments: {…}}"
        ) from None
