"""Read a message of a conversation, by the names that chat data has for its parts. Imports no torch.

A message is a role and a text. Other parts that change what is said (calls of tools, images, reasoning) are
refused with a reason. Parts that add nothing, such as an id, are passed over.
"""

import math
from typing import Any

from pipeline.data.schema import Record, RowError

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "llm"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response", "ipython"),
}
_ROLE_OF = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's roles of a call, whose text is not an answer

# Keys of a message, in order of preference: ShareGPT has from and value, Gemini parts, OpenAssistant text.
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "parts", "text")

# Keys that change what is said, and the reason why a row with one of them is not kept.
UNREAD_KEYS = {
    **dict.fromkeys(
        ("tool_calls", "tool_call", "function_call", "function_calls", "tools", "functions"), "tool-calls"
    ),
    **dict.fromkeys(
        ("images", "image", "image_url", "audio", "audios", "video", "videos", "files", "attachments"),
        "not-only-text",
    ),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "reasoning"),
}

# Keys by which chat data says whether an answer is to be learned: 0 and false make it context.
WEIGHT_KEYS = (
    "weight",
    "loss_weight",
    "loss",
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "loss_mask",
)

# Keys that change nothing. Others are counted, and prepare prints them.
HARMLESS_KEYS = (
    "id", "uuid", "message_id", "parent_id", "tool_call_id", "name", "type", "index", "turn", "timestamp",
    "created_at", "language", "lang",
)  # fmt: skip
KNOWN_KEYS = frozenset((*ROLE_KEYS, *TEXT_KEYS, *UNREAD_KEYS, *WEIGHT_KEYS, *HARMLESS_KEYS))

TEXT_PARTS = (None, "text", "input_text", "output_text")


def read_message(value: Any) -> Record:
    """Return the role and the text of a message as {role, content}.

    Raises `RowError` if it has no known role or no text, or if it says something besides its text.
    """
    if not isinstance(value, dict):
        raise RowError("not-text", f"expected a message, found {type(value).__name__}")
    role = _first(value, ROLE_KEYS)
    role = role.strip().lower() if isinstance(role, str) else role
    if role in CALL_ROLES:
        raise RowError("tool-calls", f"a message is a {role}, and calls are not read; leave these rows out")
    check_unread(value)
    if not isinstance(role, str) or role not in _ROLE_OF:
        raise RowError(
            "not-text", f"a message needs a role ({', '.join(ROLES)}), found {preview(role)}, and its text"
        )
    return {"role": _ROLE_OF[role], "content": _read_content(_first(value, TEXT_KEYS))}


def is_target(value: Record) -> bool:
    """Return whether an answer is to be learned: not if its weight is 0.

    Raises `RowError` if its weight is neither 0 nor 1.
    """
    weights = {key: value[key] for key in WEIGHT_KEYS if not carries_nothing(value.get(key))}
    numbers = list(map(_read_weight, weights.values()))
    if None in numbers:
        key, weight = list(weights.items())[numbers.index(None)]
        raise RowError("unread-weight", f"an answer has {key} {preview(weight)}; expected 0 or 1")
    return 0 not in numbers


def _read_weight(value: Any) -> int | None:
    """Return 0 or 1, or None if the weight is neither."""
    if isinstance(value, int | float):
        return int(value) if value in (0, 1) else None
    spellings = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
    return spellings.get(value.strip().lower()) if isinstance(value, str) else None


def check_unread(values: Record) -> None:
    """Raise `RowError` if a message, or a part of one, has a key that changes what is said."""
    for key, value in values.items():
        if key in UNREAD_KEYS and not carries_nothing(value):
            raise unread_error(key, UNREAD_KEYS[key])


def unread_error(key: str, reason: str) -> RowError:
    """Return the reason why a row with this column or key of a message is not kept."""
    return RowError(
        reason,
        f"{key} changes what is said and is not read; write it into the text, leave these rows out, "
        f"or pass it over with ignore: [{key}]",
    )


def carries_nothing(value: Any, depth: int = 4) -> bool:
    """Return whether a value says nothing: null, NaN, blank, or a list or an object of such values."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan")
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return not value or (depth > 0 and all(carries_nothing(item, depth - 1) for item in items))
    return value is None


def preview(value: Any) -> str:
    """Return a value as an error shows it, in at most 80 characters."""
    try:
        return repr(value[:80] if isinstance(value, str) else value)[:80]
    except (ValueError, RecursionError):  # a number of too many digits, or too deep a nesting
        return f"a {type(value).__name__}"


def _first(values: Record, keys: tuple[str, ...]) -> Any:
    """Return the value of the first key that has one. Raises `RowError` if two have different values."""
    present = [(key, values[key]) for key in keys if values.get(key) is not None]
    if len(present) > 1 and present[0][1] != present[1][1]:
        raise RowError("not-text", f"a message has {present[0][0]} and {present[1][0]}, which differ")
    return present[0][1] if present else None


def _read_content(value: Any) -> str:
    """Return the text of a content: a string, or parts of text alone, which follow each other."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError("not-text", f"expected text as the content of a message, found {type(value).__name__}")
    return "".join(map(_read_part, value))


def _read_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError("not-text", f"expected text as a part of a content, found {type(part).__name__}")
    kind = part.get("type")
    if isinstance(kind, str) and kind not in TEXT_PARTS:
        reason = "tool-calls" if "tool" in kind else "not-only-text"
        raise RowError(reason, f"a content has a part of type {preview(kind)}, and only text is read")
    check_unread(part)
    if not isinstance(part.get("text"), str):
        raise RowError("not-text", "a part of a content has no text")
    return str(part["text"])
