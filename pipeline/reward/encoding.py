"""How a reward model reads a prompt and an answer: the one place where text becomes its ids, in training, in scoring and in PPO.

`chat`: the prompt by the tokenizer's chat template, then the answer, tokenised apart and joined as ids. `pair`: the two segments of an
encoder, with its special tokens. `concatenation`: one text, the prompt (if any), `separator`, the answer, with special tokens too.
"""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import Text
from pipeline.errors import UserError
from pipeline.models.chat import completion_text, prompt_ids


@dataclass
class Encoding:
    """`eos`: whether EOS ends the ids. What exceeds `max_length` loses on the `truncation` side: on the left the prompt's beginning
    (one of its tokens stays) before the answer's end; on the right the answer's end (one stays) before the prompt's; EOS never. A
    concatenation, which is one text, is cut on that side wherever the answer lies."""

    form: str = "chat"
    separator: str = "\n"
    eos: bool = True
    truncation: str = "left"
    max_length: int = 512

    def __post_init__(self) -> None:
        for name, allowed in (("form", tuple(FORMS)), ("truncation", ("left", "right"))):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"encoding.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )


class Encoded(NamedTuple):
    """Token ids; where the answer's segment begins in them, for models with token types; whether something was cut."""

    ids: list[int]
    answer: int
    overlong: bool


def encode_response(tokenizer: PreTrainedTokenizerBase, how: Encoding, prompt: Text, answer: Text) -> Encoded:
    """The ids of one prompt (a string or messages; "" where there is none) and one answer (a string or one assistant message)."""
    return FORMS[how.form](tokenizer, how, prompt, answer)


def truncated_lengths(prompt: int, answer: int, max_length: int, side: str) -> tuple[int, int]:
    """How many tokens of each stay, together at most `max_length` (two or more)."""
    if side == "left":
        kept = min(prompt, max(1, max_length - answer))
        return kept, min(answer, max_length - kept)
    kept = min(answer, max(1, max_length - prompt))
    return min(prompt, max_length - kept), kept


def prompt_text(text: Text, separator: str) -> str:
    """A prompt as one string; of several messages each begins with its role."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return separator.join(f"{message['role']}: {message['content']}" for message in text)


def concatenated_text(how: Encoding, prompt: Text, answer: Text) -> str:
    """The one text of a concatenation."""
    question = prompt_text(prompt, how.separator)
    return question + how.separator + completion_text(answer) if question else completion_text(answer)


def _encode_chat(tokenizer: PreTrainedTokenizerBase, how: Encoding, prompt: Text, answer: Text) -> Encoded:
    eos = [tokenizer.eos_token_id] if how.eos else []
    before = prompt_ids(tokenizer, prompt)
    after = tokenizer(completion_text(answer), add_special_tokens=False, verbose=False)["input_ids"]
    room = how.max_length - len(eos)
    first, second = truncated_lengths(len(before), len(after), room, how.truncation)
    ids = (
        (before[len(before) - first :] if how.truncation == "left" else before[:first]) + after[:second] + eos
    )
    return Encoded(ids, first, first + second < len(before) + len(after))


def _encode_pair(tokenizer: PreTrainedTokenizerBase, how: Encoding, prompt: Text, answer: Text) -> Encoded:
    texts = prompt_text(prompt, how.separator), completion_text(answer)
    before, after = (tokenizer(text, add_special_tokens=False, verbose=False).encodings[0] for text in texts)
    room = how.max_length - tokenizer.num_special_tokens_to_add(pair=True)
    first, second = truncated_lengths(len(before), len(after), room, how.truncation)
    overlong = first + second < len(before) + len(after)
    before.truncate(first, direction=how.truncation)
    after.truncate(second)
    joined = tokenizer.backend_tokenizer.post_process(before, after)
    return Encoded(joined.ids, joined.sequence_ids.index(1) if second else len(joined.ids), overlong)


def _encode_concatenation(
    tokenizer: PreTrainedTokenizerBase, how: Encoding, prompt: Text, answer: Text
) -> Encoded:
    eos = [tokenizer.eos_token_id] if how.eos else []
    text = concatenated_text(how, prompt, answer)
    whole = tokenizer(text, verbose=False)["input_ids"]
    room = how.max_length - len(eos)
    if len(whole) <= room:
        return Encoded(whole + eos, len(whole), False)
    tokenizer.truncation_side = how.truncation  # the tokenizer itself keeps its special tokens
    return Encoded(tokenizer(text, truncation=True, max_length=room)["input_ids"] + eos, room, True)


FORMS = {"chat": _encode_chat, "pair": _encode_pair, "concatenation": _encode_concatenation}


def check_encoding(
    tokenizer: PreTrainedTokenizerBase, how: Encoding, source: str, most_tokens: int | None = None
) -> None:
    """Refuse a tokenizer that cannot do it, and what would not be read. Raises `UserError`."""
    if how.eos and how.form == "pair":
        raise UserError("encoding.eos: a pair ends with the tokenizer's own special tokens; set eos: false")
    if most_tokens is not None and how.max_length > most_tokens:
        raise UserError(
            f"{source}: reads at most {most_tokens} tokens, but max_length is {how.max_length}; lower it"
        )
    if how.eos and tokenizer.eos_token_id is None:
        raise UserError(
            f"{source}: its tokenizer has no EOS token; set encoding.eos: false, or encoding.form: pair"
        )
    if how.form == "pair" and not tokenizer.is_fast:
        raise UserError(
            f"{source}: its tokenizer is not a fast one, which encoding.form: pair needs; use concatenation"
        )
