"""Which token holds the last character of a step: there the step's score is taken.

A character belongs to the token with which it is complete, as in `pipeline.reward.token_rewards`. A step that
ends inside a token is judged at that token. Fast tokenizers say where in the text a token begins; the tokens
of slow ones are decoded.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import Text
from pipeline.errors import UserError
from pipeline.models.chat import (
    PRIVATE,
    PROBE,
    as_messages,
    as_reply,
    completion_text,
    escape_special,
    read_markup,
    render_messages,
    text_ids,
)
from pipeline.reward.token_rewards import quote, token_ends


def last_tokens(starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return for each end the index of the token that holds the character before it.

    `starts` are the offsets at which the tokens begin, in ascending order; `ends` are offsets too. It is the
    last token that begins before the end, and -1 if none does.
    """
    return [bisect_left(starts, end) - 1 for end in ends]


def token_starts(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the first offset of each token, in ascending order; a token without text has that before it."""
    return list(accumulate((start for start, _ in offsets), max))


def text_positions(tokenizer: PreTrainedTokenizerBase, text: str, ends: Sequence[int]) -> list[int]:
    """Return `last_tokens` in `text_ids(tokenizer, text)`.

    Raises `UserError` if a slow tokenizer's ids of the text do not decode to it.
    """
    if tokenizer.is_fast:
        return last_tokens(token_starts(_offsets(tokenizer, text, split_special_tokens=True)), ends)
    ids = text_ids(tokenizer, text)
    if not ids:
        return [-1] * len(ends)
    try:
        return last_tokens([0, *token_ends(tokenizer, ids, text)[:-1]], ends)
    except UserError:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer is a slow one, and its ids of {quote(text)} decode to "
            "another text, so the ends of steps are not known; use a model with a fast tokenizer"
        ) from None


def conversation_positions(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    ids: Sequence[int],
    ends: Sequence[int],
) -> list[int]:
    """Return `last_tokens` in `ids`, which `conversation_ids` returned; `ends` are offsets in the completion.

    Raises `UserError` if the template writes another text than the completion, so that steps are not found.
    """
    text = completion_text(completion)
    markup, messages = read_markup(tokenizer), as_messages(prompt)
    rendered = render_messages(tokenizer, [*messages, as_reply(completion)])
    probe = render_messages(tokenizer, [*messages, as_reply(PROBE)])
    before, _, after = probe.rpartition(PROBE)
    content, escaped = rendered[len(before) : len(rendered) - len(after)], escape_special(markup, text)
    # A template may strip a text.
    if not rendered.startswith(before) or not rendered.endswith(after) or content not in escaped:
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template rewrites the response {quote(text)}, so the ends "
            "of its steps are not known; use encoding.form: concatenation, or another template"
        )
    if not tokenizer.is_fast:
        return _align(tokenizer, text, ids, markup.closing_ids, ends)
    shift, last = len(before) - escaped.find(content), len(before) + len(content)
    rendered_ends = [min(shift + len(escape_special(markup, text[:end])), last) for end in ends]
    return last_tokens(_rendered_starts(tokenizer, rendered), rendered_ends)


def _align(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], closing: list[int], ends: Sequence[int]
) -> list[int]:
    """Return the positions in a conversation whose ids end with those of the text and of what closes it."""
    own = [*text_ids(tokenizer, text), *closing]
    if list(ids[len(ids) - len(own) :]) != own:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer is a slow one, and in a chat its ids of {quote(text)} "
            "are others than alone, so the ends of steps are not known; use a model with a fast tokenizer"
        )
    return [len(ids) - len(own) + position for position in text_positions(tokenizer, text, ends)]


def _rendered_starts(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Return the offset in what `render_messages` returned at which each of its tokens begins."""
    markup = read_markup(tokenizer)
    starts: list[int] = []
    offset = 0
    for number, part in enumerate(markup.escaped.split(rendered)):
        if number % 2:  # one character stands for a special token, whose spelling may be several tokens
            starts += [offset] * len(text_ids(tokenizer, markup.special[ord(part) - PRIVATE]))
        elif part:
            starts += [offset + start for start in token_starts(_offsets(tokenizer, part))]
        offset += len(part)
    return starts


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[tuple[int, int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, **options)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    return offsets
