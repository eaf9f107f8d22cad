"""How a reward model encodes a prompt and a response.

This is the one place where text becomes its token ids: in training, in scoring and in PPO. There are three
forms:

- `chat`: the conversation of prompt and response, as the tokenizer's chat template writes it.
- `pair`: the two segments of an encoder, with its special tokens.
- `concatenation`: one text of the prompt (if any), `separator` and the response, with the tokenizer's special
  tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import Text
from pipeline.errors import UserError
from pipeline.models.chat import (
    as_messages,
    closing_ids,
    common_prefix_length,
    completion_text,
    conversation_ids,
    cut_prompt,
    encode_turn,
    prompt_ids,
    read_markup,
    split_response,
    text_ids,
    truncated_lengths,
)
from pipeline.models.templates import is_plain
from pipeline.reward.step_positions import (
    conversation_positions,
    last_tokens,
    text_positions,
    token_starts,
)


@dataclass
class Encoding:
    """The settings of an encoding.

    `eos` ends the ids with EOS, unless a template or the tokenizer already ends them. Rows over `max_length`
    tokens are cut on the `truncation` side. What ends a response is never cut, nor is the BOS.

    - `left` cuts the prompt's beginning, down to one token, and then the response's end.
    - `right` cuts the response's end, down to one token, and then the prompt's end.
    - A concatenation is one text and is cut on that side, wherever the response is.

    `turn` is "template", or "text" in models that were trained before version 0.3: their chats are the
    prompt by the template, the text of the response and EOS, and special tokens in a text are not text.
    `date` is what the template prints as today's, None if it prints no date. `trim_pad` leaves out the pad
    tokens at the end of a chat: plain transformers takes the score of the token before them.
    `step_separator` is the text between the steps of a response, for a stepwise model.

    Raises `UserError` if `form` or `truncation` is unknown.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True)

    form: str = "chat"
    separator: str = "\n"
    eos: bool = True
    truncation: str = "left"
    max_length: Annotated[int, Field(gt=0)] = 512
    turn: str = "template"
    date: str | None = None
    trim_pad: bool = False
    step_separator: Annotated[str, Field(min_length=1)] = "\n"

    def __post_init__(self) -> None:
        allowed_values = {
            "form": tuple(FORMS),
            "truncation": ("left", "right"),
            "turn": ("template", "text"),
        }
        for name, allowed in allowed_values.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"encoding.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )


class Encoded(NamedTuple):
    """Token ids, the index where the response's segment begins, and whether something was cut.

    Models with token types need `response_start`. `steps` has for each step of the response the index of the
    token that holds its last character, or `CUT` if that was cut; None if no steps were asked for.
    """

    ids: list[int]
    response_start: int
    overlong: bool
    steps: list[int] | None = None

    @property
    def positions(self) -> list[int]:
        """The tokens whose outputs are wanted: those of the steps that were not cut, or the last one."""
        return [len(self.ids) - 1] if self.steps is None else [step for step in self.steps if step != CUT]


CUT = -1  # the position of a step that was cut


def encode_response(
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    prompt: Text,
    response: Text,
    ends: Sequence[int] | None = None,
) -> Encoded:
    """Encode one prompt and one response.

    The prompt is a string or messages, and "" if there is none. The response is a string or one assistant
    message. If it is the rest of a conversation, its last message is the response to all before it. `ends`
    are the offsets at which the steps of a response end, see `pipeline.reward.steps`; a step before which the
    response has no token is judged at the token before it. Raises `UserError` if the template refuses the
    conversation, or if the tokens of the steps are not known.
    """
    prompt, response = split_response(prompt, response)
    return FORMS[encoding.form](tokenizer, encoding, prompt, response, ends)


def prompt_text(text: Text, separator: str) -> str:
    """Return a prompt as one string; each of several messages begins with its role."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return separator.join(f"{message['role']}: {message['content']}" for message in text)


def concatenated_text(encoding: Encoding, prompt: Text, response: Text) -> str:
    """Return the one text of a concatenation."""
    question = prompt_text(prompt, encoding.separator)
    return (
        question + encoding.separator + completion_text(response) if question else completion_text(response)
    )


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    prompt: Text,
    response: Text,
    ends: Sequence[int] | None,
) -> Encoded:
    if encoding.turn == "text":
        if ends is not None:
            raise UserError("encoding.turn: steps are found in turns of the template alone; set it to template")
        return _encode_chat_text(tokenizer, encoding, prompt, response)
    steps = None
    if is_plain(tokenizer):
        before, turn = encode_turn(tokenizer, prompt, response)
        ids = [*before, *(turn if encoding.eos else turn[:-1])]
        if ends is not None:
            own = text_positions(tokenizer, completion_text(response), ends)
            steps = [max(0, len(before) + position) for position in own]
    else:
        ids = conversation_ids(tokenizer, prompt, response)
        if ends is not None:
            steps = [max(0, p) for p in conversation_positions(tokenizer, prompt, response, ids, ends)]
        if encoding.eos and read_markup(tokenizer).end is None:
            ids = _end(tokenizer, encoding, ids)
        while encoding.trim_pad and ids[-1] == tokenizer.pad_token_id:
            ids.pop()
        if len(ids) > encoding.max_length:
            before = prompt_ids(tokenizer, prompt)
    if len(ids) <= encoding.max_length:
        return Encoded(ids, len(ids), False, steps)

    start = common_prefix_length(before, ids)
    end = closing_ids(tokenizer, ids)
    body = ids[start : len(ids) - len(end)]
    lengths = (start, len(body), encoding.max_length - len(end))
    first, second = truncated_lengths(*lengths, encoding.truncation)
    kept = [*cut_prompt(tokenizer, ids[:start], first, encoding.truncation), *body[:second], *end]
    if steps is not None:  # one before the response is at the prompt's last token
        steps = _kept([max(-1, step - start) for step in steps], first, second)
    return Encoded(kept, len(kept), True, steps)


def _kept(positions: Sequence[int], start: int, tokens: int) -> list[int]:
    """Return positions in a response as those in a row where so many of its tokens remain, from `start` on.

    A position of -1 is that of the token before the response.
    """
    return [max(0, start + position) if position < tokens else CUT for position in positions]


def _encode_chat_text(
    tokenizer: PreTrainedTokenizerBase, encoding: Encoding, prompt: Text, response: Text
) -> Encoded:
    eos = [tokenizer.eos_token_id] if encoding.eos else []
    rendered = tokenizer.apply_chat_template(as_messages(prompt), add_generation_prompt=True, tokenize=False)
    before, after = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in (rendered, completion_text(response))
    )
    budget = encoding.max_length - len(eos)
    first, second = truncated_lengths(len(before), len(after), budget, encoding.truncation)
    prompt_part = before[len(before) - first :] if encoding.truncation == "left" else before[:first]
    return Encoded(prompt_part + after[:second] + eos, first, first + second < len(before) + len(after))


def _encode_pair(
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    prompt: Text,
    response: Text,
    ends: Sequence[int] | None,
) -> Encoded:
    texts = prompt_text(prompt, encoding.separator), completion_text(response)
    before, after = (
        tokenizer(text, add_special_tokens=False, verbose=False, **_text_options(encoding)).encodings[0]
        for text in texts
    )
    positions = None if ends is None else last_tokens(token_starts(after.offsets), ends)

    budget = encoding.max_length - tokenizer.num_special_tokens_to_add(pair=True)
    first, second = truncated_lengths(len(before), len(after), budget, encoding.truncation)
    overlong = first + second < len(before) + len(after)
    before.truncate(first, direction=encoding.truncation)
    after.truncate(second)

    joined = tokenizer.backend_tokenizer.post_process(before, after)
    start = joined.sequence_ids.index(1) if second else len(joined.ids)
    steps = None if positions is None else _kept(positions, start, second)
    return Encoded(joined.ids, start, overlong, steps)


def _encode_concatenation(
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    prompt: Text,
    response: Text,
    ends: Sequence[int] | None,
) -> Encoded:
    text, options = concatenated_text(encoding, prompt, response), _text_options(encoding)
    if ends is not None:
        options["return_special_tokens_mask"] = True
    row = tokenizer(text, verbose=False, **options)
    ids = _end(tokenizer, encoding, row["input_ids"])
    is_cut = len(ids) > encoding.max_length
    if is_cut:
        tokenizer.truncation_side = encoding.truncation  # the tokenizer itself keeps its special tokens
        budget = encoding.max_length - encoding.eos
        options |= {"truncation": True, "max_length": budget}
        row = tokenizer(text, **options)
        ids = _end(tokenizer, encoding, row["input_ids"])
    if ends is None:
        return Encoded(ids, len(ids), is_cut)

    # The row has special tokens around those of the text, and may lack the first or the last of these.
    offset, special = len(text) - len(completion_text(response)), row["special_tokens_mask"]
    tokens = special.count(0)
    lost = len(text_ids(tokenizer, text)) - tokens if encoding.truncation == "left" else 0
    own = text_positions(tokenizer, text, [offset + end for end in ends])
    kept = [max(0, position) - lost for position in own]
    start = special.index(0) if tokens else 0
    steps = [start + position if 0 <= position < max(1, tokens) else CUT for position in kept]
    return Encoded(ids, len(ids), is_cut, steps)


def _text_options(encoding: Encoding) -> dict[str, Any]:
    """Return the tokenizer's options by which a special token that a text spells is text."""
    return {} if encoding.turn == "text" else {"split_special_tokens": True}


def _end(tokenizer: PreTrainedTokenizerBase, encoding: Encoding, ids: list[int]) -> list[int]:
    """Return the ids with EOS last if the encoding has one, once."""
    has_eos = ids[-1:] == [tokenizer.eos_token_id] and encoding.turn == "template"
    return ids if has_eos or not encoding.eos else [*ids, tokenizer.eos_token_id]


FORMS = {"chat": _encode_chat, "pair": _encode_pair, "concatenation": _encode_concatenation}


def check_encoding(
    tokenizer: PreTrainedTokenizerBase, encoding: Encoding, source: str, max_positions: int | None = None
) -> None:
    """Check that the tokenizer supports the encoding and that the model has enough positions.

    `max_positions` is None if the model has no limit. Raises `UserError`.
    """
    if encoding.eos and encoding.form == "pair":
        raise UserError("encoding.eos: a pair ends with the tokenizer's own special tokens; set eos: false")
    if max_positions is not None and encoding.max_length > max_positions:
        raise UserError(
            f"{source}: reads at most {max_positions} tokens, but max_length is {encoding.max_length}; "
            "lower it"
        )
    if encoding.eos and tokenizer.eos_token_id is None:
        raise UserError(
            f"{source}: its tokenizer has no EOS token; set encoding.eos: false, or encoding.form: pair"
        )
    if encoding.form == "pair" and not tokenizer.is_fast:
        raise UserError(
            f"{source}: encoding.form: pair needs a fast tokenizer, but its tokenizer is a slow one; "
            "use concatenation"
        )
