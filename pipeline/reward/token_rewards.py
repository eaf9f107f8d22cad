"""Rewards inside a response: one number per token, or one per step, placed on the token that ends the step.

A step ends at a character of the text, and the reward belongs to a token. Which token that is follows from
decoding the ids, as the text was; encoding the text again may give other tokens than the policy sampled.
"""

import math
import operator
from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile
from numbers import Real
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError

LARGEST = torch.finfo(torch.float32).max  # rewards become fp32
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # a character whose last byte is in a later token, or never comes
MAX_QUOTED = 200  # characters of a text in an error
FINITE = "a finite number of at most 3.4e38"


class StepRewards(NamedTuple):
    """The rewards of the steps of one response, as a reward function returns them.

    `rewards` has one number per step. `ends` has for each step the offset in the text of the response at
    which it ends: the index of the character after its last one.

    >>> from pipeline import StepRewards
    >>> response = "7+5=2 2-3=8"
    >>> ends = [response.index(" "), len(response)]
    >>> StepRewards(rewards=[1.0, -1.0], ends=ends)
    StepRewards(rewards=[1.0, -1.0], ends=[5, 11])
    """

    rewards: Sequence[float]
    ends: Sequence[int]


def place_rewards(
    tokenizer: PreTrainedTokenizerBase,
    completion_ids: Sequence[int],
    text: str,
    steps: Sequence[int] | Sequence[str],
    rewards: Sequence[float],
) -> list[float]:
    """Return one reward per token: that of a step is on the token that holds the step's last character.

    `text` is the response as the reward function gets it: `completion_ids` decoded without special tokens,
    and without the token that ended it. `steps` has the offset at which each step ends, or the texts of the
    steps, which are found in their order. Rewards of steps that end in the same token add up, and every other
    token gets 0. An offset of 0 belongs to the first token.

    Raises `UserError` if there is not one finite reward per step, an offset is outside the text or before
    the last one, a step's text is not found, or `text` is not the text of `completion_ids`.

    >>> from transformers import AutoTokenizer
    >>> from pipeline import place_rewards
    >>> tokenizer = AutoTokenizer.from_pretrained("runs/demo/sft")
    >>> ids = tokenizer("Rome. Paris.")["input_ids"]
    >>> placed = place_rewards(tokenizer, ids, tokenizer.decode(ids), ["Rome.", "Paris."], [1.0, -0.5])
    >>> len(placed) == len(ids), sum(placed), placed[-1]
    (True, 0.5, -0.5)
    """
    ends, values = check_steps(text, steps, rewards)
    placed = [0.0] * len(completion_ids)
    if not ends:
        return placed
    reached = token_ends(tokenizer, completion_ids, text)
    for end, value in zip(ends, values, strict=True):
        placed[bisect_left(reached, end)] += value
    return placed


def check_steps(text: str, steps: Any, rewards: Any) -> tuple[list[int], list[float]]:
    """Return the offset at which each step of `text` ends, and its reward; both as `place_rewards` has them.

    Raises `UserError` if one is wrong, or their numbers differ.
    """
    steps, rewards = _as_list("steps", steps), _as_list("rewards", rewards)
    if len(rewards) != len(steps):
        raise UserError(
            f"the response {quote(text)} has {len(rewards)} rewards for {len(steps)} steps; "
            "expected one per step"
        )
    ends, values = [0], []
    for number, (step, reward) in enumerate(zip(steps, rewards, strict=True), 1):
        name, value = f"step {number} of {len(steps)} of the response {quote(text)}", as_number(reward)
        if value is None:
            raise UserError(f"{name}: its reward is {quote(reward)}; expected {FINITE}")
        ends.append((_find if isinstance(step, str) else _offset)(name, text, step, ends[-1]))
        values.append(value)
    return ends[1:], values


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """Return for each token how many characters of `text` its ids and those before it spell.

    A character belongs to the token with which it is complete; a token that adds none, such as an EOS or a
    special token, has the number of the one before it. `text` is the beginning of what `ids` decode to
    without special tokens, all but the token that ended the response. Raises `UserError` if it is not.
    """
    ends = _token_ends(tokenizer, ids, text, is_windowed=True)
    if ends is None:  # a tokenizer whose text of some tokens depends on others far away
        ends = _token_ends(tokenizer, ids, text, is_windowed=False)
    if ends is None:
        raise UserError(f"the response {quote(text)} is not what its {len(ids)} completion_ids decode to")
    return ends


def _token_ends(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, *, is_windowed: bool
) -> list[int] | None:
    """Return `token_ends`, or None if `text` is not reached.

    Windows make the time linear: they start one piece of text before the tokens that are decoded, since the
    first token of a text may lose its space.
    """
    ends: list[int] = []
    start = read = done = 0  # the window's first token, its first new one, and the characters before that
    known = ""  # the text of the window before its first new token
    for index in range(len(ids)):
        window = _decode(tokenizer, ids[start : index + 1])
        new = window[len(known) :]
        matched = _common_length(new, text[done : done + len(new)])
        ends.append(max(done + matched, ends[-1] if ends else 0))
        if not is_windowed or not new or new.endswith(INCOMPLETE):
            continue
        if ends[-1] < len(text) and (matched < len(new) or not window.startswith(known)):
            return None
        start, read, done = read, index + 1, done + len(new)
        known = _decode(tokenizer, ids[start:read])
    return ends if ends and ends[-1] == len(text) else None


def total_reward(entry: float | Sequence[float] | StepRewards) -> float:
    """Return the reward of a whole response: the sum of those of its tokens or steps."""
    rewards = entry.rewards if isinstance(entry, StepRewards) else entry
    return math.fsum(rewards) if isinstance(rewards, Sequence) else rewards


def spread_reward(entry: float | list[float], tokens: int) -> list[float]:
    """Return the reward of a response as one number per token; a single number is on the last token."""
    return entry if isinstance(entry, list) else ([0.0] * (tokens - 1) + [entry])[:tokens]


def as_number(value: Any) -> float | None:
    """Return a number that fp32 holds as a float, and None for anything else; True counts 1."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    is_number = isinstance(value, Real) and -LARGEST <= value <= LARGEST  # type: ignore[operator]
    return float(value) if is_number else None


def quote(value: Any) -> str:
    """Return a value as an error shows it: its beginning if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


def _find(name: str, text: str, step: str, start: int) -> int:
    """Return the offset at which the first `step` at or behind `start` ends."""
    offset = text.find(step, start)
    if offset < 0:
        raise UserError(
            f"{name}: its text {quote(step)} is not there from character {start} on; "
            "expected the texts of the steps in their order"
        )
    return offset + len(step)


def _offset(name: str, text: str, step: Any, start: int) -> int:
    """Return `step` as an offset that is not before `start`."""
    try:
        end = operator.index(step)
    except TypeError:
        problem = f"it ends at {quote(step)}; expected the offset of a character, or the text of the step"
        raise UserError(f"{name}: {problem}") from None
    if not start <= end <= len(text):
        raise UserError(
            f"{name}: it ends at character {end}; expected {start} to {len(text)}, from the end of the step "
            "before it to the end of the response"
        )
    return end


def _as_list(name: str, values: Any) -> list[Any]:
    """Return a list, a tuple, or an array or tensor of one dimension as a list."""
    if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise UserError(f"{name} is a {type(values).__name__}; expected a list")
    return list(values)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _common_length(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
