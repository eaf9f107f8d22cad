"""Rewards and values inside responses, as strips of parts that the report colours. Imports no torch.

In: rows of a ppo artifact's `samples.jsonl`, of which those of PPO have `tokens` (texts that join to the
response), `token_rewards` and `token_values`, one number per token.
Out: for each response its parts, with their rewards and the critic's values.
Wrong input: a row without these lists, or with lists of other lengths, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from pipeline.formatting.numbers import as_finite

MAX_STRIPS = 8  # responses that the report shows
MAX_PARTS = 32  # of a response with more rewards, neighbours are shown as one part
EVEN_PARTS = 12  # of a response without rewards inside, at most
MAX_TEXT = 3_000  # characters of a response; those of a part follow from the number of parts
MAX_PROMPT = 400  # characters
WIDE = 50  # characters; two shorter responses stand side by side


class Part(NamedTuple):
    """Some consecutive tokens of a response.

    `reward` is the sum of their rewards, and `value` the critic's in the state before the first of them. A
    number that is missing or not finite is None.
    """

    text: str
    reward: float | None
    value: float | None


def last_evaluation(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first `MAX_STRIPS` rows of the last step that have rewards inside the response."""
    steps: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if _has_tokens(row):
            steps.setdefault(row.get("step", 0), []).append(row)
    return steps[max(steps)][:MAX_STRIPS] if steps else []


def _has_tokens(row: dict[str, Any]) -> bool:
    tokens, rewards = row.get("tokens"), row.get("token_rewards")
    return bool(tokens) and isinstance(rewards, list) and len(rewards) == len(tokens)


def cut_parts(
    tokens: Sequence[str], rewards: Sequence[float | None], values: Sequence[float | None] | None = None
) -> list[Part]:
    """Cut a response after each token with a reward.

    With fewer than two rewards it is also cut at words, into about `EVEN_PARTS` parts of equal length. The
    texts of the parts join to the response.
    """
    ends = {i + 1 for i, reward in enumerate(rewards) if as_finite(reward) != 0}
    if len(ends) < 2:
        ends |= _even_ends(tokens)
    if not "".join(tokens[max(ends, default=0) :]).strip():
        ends.discard(max(ends, default=0))  # an end token without a reward is no part of its own
    places = sorted(ends | {len(tokens)})
    size = math.ceil(len(places) / MAX_PARTS)
    places = [*places[size - 1 :: size], len(tokens)]

    values = values if values is not None and len(values) == len(tokens) else [None] * len(tokens)
    bounds = pairwise(dict.fromkeys([0, *places]))
    return [
        Part("".join(tokens[start:end]), _add(rewards[start:end]), as_finite(values[start]))
        for start, end in bounds
    ]


def _even_ends(tokens: Sequence[str]) -> set[int]:
    """Return where a text is cut into at most `EVEN_PARTS` parts: before a blank, if there is one in time."""
    least = math.ceil(len(tokens) / EVEN_PARTS)
    ends = [0]
    for i, token in enumerate(tokens):
        length = i - ends[-1]
        if token and length >= least and (token[:1].isspace() or length >= 3 * least):
            ends.append(i)
    return set(ends[1:])


def _add(numbers: Sequence[float | None]) -> float | None:
    finite = [number for number in map(as_finite, numbers) if number is not None]
    return math.fsum(finite) if len(finite) == len(numbers) else None


def draw_strips(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the template shows of the rows of `last_evaluation`; nothing of no rows.

    All responses have one scale. `share` is a reward's size relative to the largest, from 0 to 1. A value is
    a bar from `zero` to it; `bottom` and `height` are in percent of the bars' height.
    """
    rows = [row for row in rows if _has_tokens(row)][:MAX_STRIPS]
    if not rows:
        return {}
    cut = [cut_parts(row["tokens"], row["token_rewards"], row.get("token_values")) for row in rows]
    parts = [part for parts in cut for part in parts]
    most = max((abs(part.reward) for part in parts if part.reward is not None), default=0.0)
    values = [part.value for part in parts if part.value is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)
    return {
        "step": rows[0].get("step"),
        "most": most,
        "value_range": (low, high) if values else None,
        "zero": _height(0.0, low, high),
        "responses": [
            {
                "prompt": row.get("prompt"),
                "reward": row.get("reward"),
                "gold_reward": row.get("gold_reward"),
                "is_wide": sum(map(len, row["tokens"])) > WIDE,
                "parts": [_draw_part(part, len(parts), most, (low, high)) for part in parts],
            }
            for row, parts in zip(rows, cut, strict=True)
        ],
    }


def _draw_part(part: Part, count: int, most: float, value_range: tuple[float, float]) -> dict[str, Any]:
    """Return what the template shows of one of `count` parts."""
    reward = part.reward or 0.0
    bottom, top = sorted(_height(value, *value_range) for value in (0.0, part.value or 0.0))
    return {
        "text": shorten_middle(part.text.strip(), MAX_TEXT // count),
        "reward": part.reward,
        "value": part.value,
        "sign": "plus" if reward > 0 else "minus" if reward < 0 else "none",
        "share": round(abs(reward) / most, 3) if most else 0.0,
        "bottom": bottom,
        "height": round(top - bottom, 1),
    }


def _height(value: float, low: float, high: float) -> float:
    """Return the height of a value in percent; 0 and 100 are the ends of a range that contains 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    return round(100 * (value / 2 - low / 2) / (high / 2 - low / 2), 1) if high > low else 0.0


def shorten_middle(text: str, limit: int = MAX_PROMPT) -> str:
    """Return a text of about `limit` characters at most: its start and its end, with "…" between them."""
    return text if len(text) <= limit else f"{text[: limit * 3 // 4]} … {text[-(limit // 4) :]}"
