"""Split whole dialogues into a prompt and two responses, as TRL messages."""

import re
from itertools import groupby
from typing import Any

from pipeline.data.schema import RowError

# Turns of an hh-rlhf dialogue.
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
ASSISTANT_TURN = "\n\nAssistant:"
TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_dialogue(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Split two whole dialogues into prompt, chosen and rejected, as TRL messages.

    The prompt is what the two share up to the last response. Both are text in hh-rlhf's style
    (`\\n\\nHuman: … \\n\\nAssistant: …`) or message lists. Raises `RowError` if they are neither.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = _count_shared(chosen, rejected)
        cuts = [m.start() for m in re.finditer(ASSISTANT_TURN, chosen) if m.end() <= shared]
        if not cuts:
            raise RowError("not-a-dialogue", f"the two share no {ASSISTANT_TURN!r}")
        return {
            "prompt": parse_turns(chosen[: cuts[-1]]),
            "chosen": parse_turns(chosen[cuts[-1] :]),
            "rejected": parse_turns(rejected[cuts[-1] :]),
        }

    if isinstance(chosen, list) and isinstance(rejected, list):
        pairs = enumerate(zip(chosen[:-1], rejected[:-1], strict=False))
        differences = (index for index, (one, other) in pairs if one != other)
        cut = next(differences, min(len(chosen), len(rejected)) - 1)
        return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}

    raise RowError(
        "not-text", f"expected two dialogues, found {type(chosen).__name__} and {type(rejected).__name__}"
    )


def _count_shared(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def parse_turns(text: str) -> list[dict[str, str]]:
    """Parse an hh-rlhf dialogue into TRL messages, with white space stripped.

    Consecutive turns of one speaker become one message. Raises `RowError` if text precedes the first turn.
    """
    head, *parts = TURN.split(text)
    if head.strip():
        raise RowError("not-a-dialogue", "there is text before the first 'Human:' or 'Assistant:'")

    turns = groupby(zip(parts[::2], parts[1::2], strict=True), key=lambda turn: turn[0])
    return [
        {"role": TURN_ROLES[speaker], "content": "\n\n".join(turn.strip() for _, turn in group).strip()}
        for speaker, group in turns
    ]
