"""Decide when two texts are the same, and when a text is empty. Imports no torch."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.data.messages import read_message
from pipeline.data.schema import Record, RowError

# Characters that show nothing: controls, format characters, variation selectors, fillers, a blank of Braille.
_UNSEEN = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
UNSEEN = re.compile(f"[{_UNSEEN}]+")
UNSEEN_ASCII = dict.fromkeys((*range(9), *range(14, 32), 127))  # translate() is faster, on ASCII only
BLANK = re.compile(rf"[\s{_UNSEEN}]*")


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: it has white space and invisible characters only."""
    return BLANK.fullmatch(text) is not None


def visible_text(text: str) -> str:
    """Return what a reader sees of a text: in NFC, with LF, without unseen characters and outer blanks."""
    if text.isascii():
        return text.translate(UNSEEN_ASCII).replace("\r\n", "\n").strip()
    return unicodedata.normalize("NFC", UNSEEN.sub("", text).replace("\r\n", "\n")).strip()


def canonical_text(value: Any) -> str:
    """Return the text that equal values share: 1 and 1.0 are equal, and messages if role and content are.

    A single user or assistant message equals its content as a string. Raises `RowError` if the value is
    nested too deeply to be compared.
    """
    if isinstance(value, str):
        return value
    match messages := _read_messages(value):
        case [{"role": "user" | "assistant", "content": str(content)}]:
            return content
    try:
        return json.dumps(_comparable(value) if messages is None else messages, sort_keys=True, default=str)
    except (ValueError, TypeError, RecursionError):
        raise RowError("not-text", "holds a value that cannot be compared") from None


def _comparable(value: Any) -> Any:
    """Return a value in which equal numbers are one number, and keys are text."""
    if isinstance(value, dict):
        return {str(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def visible_identity(value: Any) -> str:
    """Return the text that prompts or responses share if a reader cannot tell them apart."""
    if isinstance(value, str):
        return visible_text(value)
    return canonical_text([message | {"content": visible_text(message["content"])} for message in value])


def question(prompt: Any) -> str:
    """Return what the same question shares, whatever its system turn: how a reader sees its other turns."""
    if isinstance(prompt, str):
        return visible_text(prompt)
    turns = [message for message in prompt if message["role"] != "system"]
    return visible_identity(turns or prompt)


def number_questions(prompts: Iterable[Any]) -> list[int]:
    """Return for each row the number of its `question`, from 0 in order of appearance.

    A row whose prompt is empty or missing responds to nothing: it has a number of its own.
    """
    numbers: dict[str | int, int] = {}
    keys = [(question(prompt) if prompt else "") or row for row, prompt in enumerate(prompts)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _read_messages(value: Any) -> list[Record] | None:
    if not isinstance(value, Sequence) or not value:
        return None
    try:
        return [read_message(message) for message in value]
    except RowError:
        return None
