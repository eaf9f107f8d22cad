"""The one encoding of a prompt and a completion; training, scoring and generation all call these functions.

A prompt is a string (one user turn) or TRL messages. The tokenizer's chat template renders it, with the
generation prompt. A completion is a string or one assistant message, and always ends with EOS. The two are
tokenized separately and joined as ids, so the ids of a prompt do not depend on what follows it.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import Text
from pipeline.errors import UserError

PAD, EOS = "<|pad|>", "<|eos|>"

# For tokenizers without a chat template: the turns as they are; a separator ends each but the assistant's.
PLAIN_TEMPLATE = (
    "{{% for m in messages %}}{{{{ m.content }}}}"
    "{{% if m.role == 'assistant' %}}{{{{ eos_token }}}}"
    "{{% else %}}{{{{ {separator!r} }}}}{{% endif %}}{{% endfor %}}"
)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Return the token ids of a prompt, up to where the response begins."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]


def completion_ids(tokenizer: PreTrainedTokenizerBase, completion: Text) -> list[int]:
    """Return the token ids of a completion, with EOS last."""
    text = completion_text(completion)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, max_length: int
) -> tuple[list[int], list[int]]:
    """Return (prompt ids, completion ids) with at most `max_length` ids together.

    If they are longer, the prompt loses its beginning (one token stays), then the completion its end. The EOS
    stays.
    """
    return truncate(prompt_ids(tokenizer, prompt), completion_ids(tokenizer, completion), max_length)


def truncate(prompt: list[int], completion: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Truncate ids to `max_length` together, in the order that `encode_pair` describes."""
    prompt = prompt[-max(1, max_length - len(completion)) :]
    budget = max_length - len(prompt)
    if len(completion) > budget:
        completion = [*completion[: budget - 1], completion[-1]]
    return prompt, completion


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
