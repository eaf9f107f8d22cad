"""How a reward model encodes a prompt and a response.

This is the one place where text becomes its token ids: in training, in scoring and in PPO. There are three
forms:

- `chat`: the prompt by the tokenizer's chat template, then the response. The two are tokenised separately,
  and their ids are concatenated.
- `pair`: the two segments of an encoder, with its special tokens.
- `concatenation`: one text of the prompt (if any), `separator` and the response, with the tokenizer's special
  tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import Text
from pipeline.errors import UserError
from pipeline.models.chat import completion_text, prompt_ids


@dataclass
class Encoding:
    """The settings of an encoding.

    `eos` ends the ids with EOS. Rows over `max_length` tokens are cut on the `truncation` side; EOS is never
    cut.

    - `left` cuts the prompt's beginning, down to one token, and then the response's end.
    - `right` cuts the response's end, down to one token, and then the prompt's end.
    - A concatenation is one text and is cut on that side, wherever the response is.

    Raises `UserError` if `form` or `truncation` is unknown.
    """

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
    """Token ids, the index where the response's segment begins, and whether something was cut.

    Models with token types need `response_start`.
    """

    ids: list[int]
    response_start: int
    overlong: bool


def encode_response(
    tokenizer: PreTrainedTokenizerBase, encoding: Encoding, prompt: Text, response: Text
) -> Encoded:
    """Encode one prompt and one response.

    The prompt is a string or messages, and "" if there is none. The response is a string or one assistant
    message.
    """
    return FORMS[encoding.form](tokenizer, encoding, prompt, response)


def truncated_lengths(prompt: int, response: int, max_length: int, side: str) -> tuple[int, int]:
    """Return how many tokens of the prompt and of the response remain.

    Their sum is at most `max_length`, which must be two or more.
    """
    if side == "left":
        kept = min(prompt, max(1, max_length - response))
        return kept, min(response, max_length - kept)
    kept = min(response, max(1, max_length - prompt))
    return min(prompt, max_length - kept), kept


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
    tokenizer: PreTrainedTokenizerBase, encoding: Encoding, prompt: Text, response: Text
) -> Encoded:
    eos = [tokenizer.eos_token_id] if encoding.eos else []
    before = prompt_ids(tokenizer, prompt)
    after = tokenizer(completion_text(response), add_special_tokens=False, verbose=False)["input_ids"]

    budget = encoding.max_length - len(eos)
    first, second = truncated_lengths(len(before), len(after), budget, encoding.truncation)
    prompt_part = before[len(before) - first :] if encoding.truncation == "left" else before[:first]
    return Encoded(prompt_part + after[:second] + eos, first, first + second < len(before) + len(after))


def _encode_pair(
    tokenizer: PreTrainedTokenizerBase, encoding: Encoding, prompt: Text, response: Text
) -> Encoded:
    texts = prompt_text(prompt, encoding.separator), completion_text(response)
    before, after = (tokenizer(text, add_special_tokens=False, verbose=False).encodings[0] for text in texts)

    budget = encoding.max_length - tokenizer.num_special_tokens_to_add(pair=True)
    first, second = truncated_lengths(len(before), len(after), budget, encoding.truncation)
    overlong = first + second < len(before) + len(after)
    before.truncate(first, direction=encoding.truncation)
    after.truncate(second)

    joined = tokenizer.backend_tokenizer.post_process(before, after)
    return Encoded(joined.ids, joined.sequence_ids.index(1) if second else len(joined.ids), overlong)


def _encode_concatenation(
    tokenizer: PreTrainedTokenizerBase, encoding: Encoding, prompt: Text, response: Text
) -> Encoded:
    eos = [tokenizer.eos_token_id] if encoding.eos else []
    text = concatenated_text(encoding, prompt, response)
    ids = tokenizer(text, verbose=False)["input_ids"]
    budget = encoding.max_length - len(eos)
    if len(ids) <= budget:
        return Encoded(ids + eos, len(ids), False)

    tokenizer.truncation_side = encoding.truncation  # the tokenizer itself keeps its special tokens
    ids = tokenizer(text, truncation=True, max_length=budget)["input_ids"]
    return Encoded(ids + eos, budget, True)


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
