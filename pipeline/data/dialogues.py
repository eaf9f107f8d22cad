"""Split whole conversations into the prompt that they share and their responses, as TRL messages."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pipeline.data.identity import question, visible_text
from pipeline.data.messages import read_message
from pipeline.data.schema import Record, RowError

# Turns of an hh-rlhf dialogue.
TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")
TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_dialogue(chosen: Any, rejected: Any) -> Record:
    """Split two whole dialogues into prompt, chosen and rejected, as TRL messages.

    The prompt is what the two share, up to a response of each. Both are text in hh-rlhf's style
    (`\\n\\nHuman: … \\n\\nAssistant: …`) or message lists. Raises `RowError` if they are neither.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, rests = split_shared([_split_turns(chosen), _split_turns(rejected)])
        return {
            "prompt": merge_turns(prompt),
            "chosen": merge_turns(rests[0]),
            "rejected": merge_turns(rests[1]),
        }

    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, rests = split_shared([chosen, rejected])
        return {"prompt": prompt, "chosen": rests[0], "rejected": rests[1]}

    raise RowError(
        "not-text", f"expected two dialogues, found {type(chosen).__name__} and {type(rejected).__name__}"
    )


def split_shared(conversations: Sequence[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """Return the messages that all conversations begin with, and the rest of each, from a response on.

    Messages are compared by role and by what a reader sees of their content. Raises `RowError` if a message
    cannot be read, or if the conversations share no turn before a response of each.
    """
    seen = [list(map(_seen, conversation)) for conversation in conversations]
    turns = list(enumerate(map(set, zip(*seen, strict=False))))  # what they have in each place
    parted = next((index for index, messages in turns if len(messages) > 1), len(turns))
    answers = [
        index for index, messages in turns[: parted + 1] if {role for role, _ in messages} == {"assistant"}
    ]
    if not answers:
        raise RowError("not-a-dialogue", "the conversations share no prompt before a response of each")
    cut = answers[-1]
    return conversations[0][:cut], [conversation[cut:] for conversation in conversations]


def detach_prompt(prompt: Any, responses: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return (prompt, responses); responses that repeat the prompt, as whole conversations, lose it.

    Raises `RowError` if they begin with another prompt.
    """
    if not responses or not all(
        isinstance(response, list) and _is_conversation(response) for response in responses
    ):
        return prompt, list(responses)
    shared, rests = split_shared(responses)
    if not isinstance(prompt, str | list) or question(_read_all(prompt)) != question(_read_all(shared)):
        raise RowError(
            "not-one-answer",
            "a response is a conversation that does not begin with the prompt; whole conversations are "
            "format: dialogues, or messages",
        )
    return shared, rests


def parse_turns(text: str) -> list[dict[str, str]]:
    """Parse an hh-rlhf dialogue into TRL messages, with white space stripped.

    Consecutive turns of one speaker become one message. Raises `RowError` if text precedes the first turn.
    """
    return merge_turns(_split_turns(text))


def merge_turns(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return turns with consecutive ones of one speaker as one message."""
    return [
        {"role": role, "content": "\n\n".join(turn["content"] for turn in group).strip()}
        for role, group in groupby(turns, key=lambda turn: turn["role"])
    ]


def _split_turns(text: str) -> list[dict[str, str]]:
    head, *parts = TURN.split(text)
    if head.strip():
        raise RowError(
            "not-a-dialogue",
            "there is text before the first 'Human:' or 'Assistant:'; without turns, a prompt is needed",
        )
    return [
        {"role": TURN_ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _seen(message: Any) -> tuple[str, str]:
    read = read_message(message)
    return read["role"], visible_text(read["content"])


def _is_conversation(messages: list[Any]) -> bool:
    return len(messages) > 1 and read_message(messages[0])["role"] != "assistant"


def _read_all(text: Any) -> Any:
    return text if isinstance(text, str) else list(map(read_message, text))
