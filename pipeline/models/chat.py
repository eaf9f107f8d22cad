"""The one encoding of a conversation; training, scoring and generation all call these functions.

A prompt is a string (one user turn) or TRL messages. The tokenizer's chat template renders it, with the
generation prompt. A completion is a string or one assistant message. Its turn is what the template writes
after the generation prompt: the text, what may stand before it (an empty `<think>` block), and what closes it
(`<|im_end|>` and a line break). A turn always has an end token.

- The ids of prompt and turn are those of the whole conversation, split where the prompt's ids end.
- If the two would share a token, or the tokenizer had no template, they are tokenized apart: the ids of a
  prompt do not depend on what follows it.
- If the template rewrites the prompt once an answer follows, the turn is the text, without what the
  generation prompt already wrote of it, and what the template writes after a text. This is logged once.
- A special token that is spelled in the text of a message is text: its ids are those of its characters.
"""

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import Text
from pipeline.errors import UserError
from pipeline.models.templates import default_template, is_plain

logger = logging.getLogger(__name__)

PAD, EOS = "<|pad|>", "<|eos|>"

PROBE = "PROBE"  # the text of a turn that shows what the template writes after it
PRIVATE = 0xF0000  # the first of the characters that stand for special tokens in a text, for private use


class Markup(NamedTuple):
    """What a tokenizer and its template add to texts.

    `closing_ids` is what the template writes after the text of a turn, `end` the special token in it, and
    None if it has none. `special` are the special tokens. `pattern` finds them in a text, and `escaped` finds
    the characters that stand for them.
    """

    closing_ids: list[int]
    end: int | None
    special: list[str]
    pattern: re.Pattern[str]
    escaped: re.Pattern[str]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Return the token ids of a prompt, up to where the response begins.

    Raises `UserError` if the template refuses the conversation.
    """
    return _tokenize(tokenizer, render_messages(tokenizer, as_messages(prompt), add_generation_prompt=True))


def conversation_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> list[int]:
    """Return the token ids of a prompt and a completion, as plain `apply_chat_template` encodes them.

    Raises `UserError` if the template refuses the conversation.
    """
    messages = [*as_messages(prompt), as_reply(completion)]
    return _tokenize(tokenizer, render_messages(tokenizer, messages))


def encode_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt, and those of the assistant's turn.

    Raises `UserError` if the template refuses the conversation.
    """
    messages, text = as_messages(prompt), completion_text(completion)
    before = render_messages(tokenizer, messages, add_generation_prompt=True)
    ids = _tokenize(tokenizer, before)
    if is_plain(tokenizer):
        return ids, [*text_ids(tokenizer, text), tokenizer.eos_token_id]

    markup = read_markup(tokenizer)
    whole = render_messages(tokenizer, [*messages, as_reply(completion)])
    all_ids = _tokenize(tokenizer, whole)
    if not whole.startswith(before):
        _warn_of_rewriting(str(tokenizer.name_or_path))
        opened = before[common_prefix_length(before, whole) :]  # such as "<think>", which the text may repeat
        turn = [*text_ids(tokenizer, text.removeprefix(opened)), *markup.closing_ids]
    elif all_ids[: len(ids)] == ids:
        turn = all_ids[len(ids) :]
    else:
        turn = _tokenize(tokenizer, whole[len(before) :])
    return ids, turn if markup.end is not None else [*turn, tokenizer.eos_token_id]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, max_length: int, side: str = "left"
) -> tuple[list[int], list[int], bool]:
    """Return (prompt ids, ids of the turn, whether something was cut), at most `max_length` ids together.

    If they are longer, `left` cuts the prompt's beginning (one token stays, and the BOS), then the turn's
    end. `right` cuts the turn's end, then the prompt's. A turn that is cut has no end token, so that no model
    learns to stop in mid-sentence.
    """
    ids, turn = encode_turn(tokenizer, prompt, completion)
    first, second = truncated_lengths(len(ids), len(turn), max_length, side)
    is_cut = first + second < len(ids) + len(turn)
    if second < len(turn):
        second = min(second, len(turn) - len(closing_ids(tokenizer, turn)))
    return cut_prompt(tokenizer, ids, first, side), turn[:second], is_cut


def truncated_lengths(prompt: int, response: int, max_length: int, side: str) -> tuple[int, int]:
    """Return how many tokens of the prompt and of the response remain.

    Their sum is at most `max_length`, which must be two or more.
    """
    if side == "left":
        kept = min(prompt, max(1, max_length - response))
        return kept, min(response, max_length - kept)
    kept = min(response, max(1, max_length - prompt))
    return min(prompt, max_length - kept), kept


def cut_prompt(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int, side: str) -> list[int]:
    """Return `length` of a prompt's ids, without its beginning or its end. A BOS stays where it was."""
    if len(ids) <= length:
        return ids
    if side == "right":
        return ids[:length]
    if length > 1 and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        return [ids[0], *ids[1 - length :]]
    return ids[len(ids) - length :]


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of what two sequences have in common from their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def closing_ids(tokenizer: PreTrainedTokenizerBase, turn: list[int]) -> list[int]:
    """Return the last ids of a turn: what the template writes after a text, or else an EOS."""
    closing = read_markup(tokenizer).closing_ids
    if closing and turn[-len(closing) :] == closing:
        return closing
    return [tokenizer.eos_token_id] if turn[-1:] == [tokenizer.eos_token_id] else []


def as_messages(prompt: Text) -> list[dict[str, Any]]:
    """Return a prompt as messages; a prompt of no messages is an empty user turn, as "" is."""
    if isinstance(prompt, str) or not prompt:
        return [{"role": "user", "content": prompt or ""}]
    return list(prompt)


def as_reply(completion: Text) -> dict[str, Any]:
    """Return a completion as an assistant message."""
    completion_text(completion)  # raises if there is not exactly one message
    return {"role": "assistant", "content": completion} if isinstance(completion, str) else completion[0]


def completion_text(completion: Text) -> str:
    """Return the text of a completion, a string or one assistant message.

    Raises `UserError` if there is not exactly one message.
    """
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise UserError(
            f"a completion of {len(completion)} messages: expected a string or one assistant message"
        )
    return completion[0]["content"]


def split_response(prompt: Text, response: Text) -> tuple[Text, Text]:
    """Return the conversation before the last message of a response, and that message.

    A response of several messages is the rest of a conversation, which begins and ends with the assistant.
    Raises `UserError` if it does not.
    """
    if isinstance(response, str) or len(response) < 2:
        return prompt, response
    if any(message["role"] != "assistant" for message in (response[0], response[-1])):
        roles = ", ".join(str(message["role"]) for message in response)
        raise UserError(
            f"a response of {len(response)} messages ({roles}): expected the first and the last one from the "
            "assistant; the prompt is no part of it"
        )
    return [*(as_messages(prompt) if prompt else []), *response[:-1]], response[-1:]


def response_text(response: Text) -> str:
    """Return the texts of a response's messages, a line each."""
    return response if isinstance(response, str) else "\n".join(message["content"] for message in response)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text alone; a special token that it spells is text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def read_markup(tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Return what the tokenizer and its template add to texts."""
    return _read_markup(tokenizer, default_template(tokenizer) or "", len(tokenizer))


@lru_cache(maxsize=32)
def _read_markup(tokenizer: PreTrainedTokenizerBase, template: str, size: int) -> Markup:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda token: (-len(token), token))
    pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    escaped = re.compile(f"([{chr(PRIVATE)}-{chr(PRIVATE + max(0, len(special) - 1))}])")
    closing = ""
    with suppress(TemplateError, TypeError, ValueError):  # a template may refuse these turns
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        if template:
            closing = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(PROBE)[2]
    ids = tokenizer(closing, add_special_tokens=False, verbose=False)["input_ids"] if closing else []
    special_ids = {tokenizer.convert_tokens_to_ids(token) for token in special}
    end = next((token for token in ids if token in special_ids), None)
    return Markup(ids, end, special, pattern, escaped)


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **options: Any) -> str:
    """Render messages; in their texts, characters for private use stand for special tokens.

    Raises `UserError` if the template refuses the conversation.
    """
    markup = read_markup(tokenizer)
    escaped = [
        message | {"content": escape_special(markup, message["content"])}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]
    try:
        return str(tokenizer.apply_chat_template(escaped, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        beginning = repr(messages[0].get("content"))[:60]
        raise UserError(
            f"the chat template refuses the conversation ({roles}) that begins with {beginning}: "
            f"{' '.join(str(error).split())}; change or remove this row, or give the model's tokenizer a "
            "template that takes it"
        ) from error


def escape_special(markup: Markup, text: str) -> str:
    """Return a text in which one character for private use stands for each special token that it spells."""
    return markup.pattern.sub(lambda match: chr(PRIVATE + markup.special.index(match.group())), text)


def _tokenize(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Return the ids of what `render_messages` returned: markup as special tokens, escaped ones as text."""
    markup = read_markup(tokenizer)
    ids: list[int] = []
    # A split by a pattern with a group: every second part is an escaped token.
    for number, part in enumerate(markup.escaped.split(rendered)):
        if number % 2:
            ids += text_ids(tokenizer, markup.special[ord(part) - PRIVATE])
        elif part:
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@lru_cache
def _warn_of_rewriting(source: str) -> None:
    logger.warning(
        "%s: its chat template renders a prompt differently once an answer follows; the turn is taken as the "
        "answer's text and what the template writes after it",
        source,
    )


def pad_rows(
    rows: Sequence[Sequence[int]], value: int, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, mask), both (rows, longest row), int64; the mask is 1 on real tokens."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, span] = torch.tensor(row, dtype=torch.long)
        mask[i, span] = 1
    return ids, mask
