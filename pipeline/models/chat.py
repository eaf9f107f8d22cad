"""The one reading of a prompt and a completion: everything that trains, scores or generates calls these functions.

A prompt is a string (one user turn) or TRL messages, rendered by the tokenizer's chat template with the generation prompt; a
completion is a string or one assistant message, and ends with EOS, always. The two are tokenised apart and joined as ids, so the ids
of a prompt do not depend on what follows it.
"""

from collections.abc import Sequence

import torch
from transformers import (
    PreTrainedTokenizerBase,
)

from pipeline.data.schema import Text
from pipeline.errors import UserError

PAD, EOS = "<|pad|>", "<|eos|>"

# For tokenizers without a chat template: turns as they are, a user's ended by a separator.
PLAIN_TEMPLATE = (
    "{{% for m in messages %}}{{{{ m.content }}}}"
    "{{% if m.role == 'assistant' %}}{{{{ eos_token }}}}{{% else %}}{{{{ {separator!r} }}}}{{% endif %}}{{% endfor %}}"
)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """Token ids of a prompt, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]


def completion_ids(tokenizer: PreTrainedTokenizerBase, completion: Text) -> list[int]:
    """Token ids of a completion, EOS last."""
    return [
        *tokenizer(completion_text(completion), add_special_tokens=False, verbose=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, max_length: int
) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids) with at most `max_length` ids together.

    Where they do not fit, the prompt loses its beginning (one token stays), then the completion its end, never its EOS.
    """
    return truncate(prompt_ids(tokenizer, prompt), completion_ids(tokenizer, completion), max_length)


def truncate(prompt: list[int], completion: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Shorten as `encode` says."""
    prompt = prompt[-max(1, max_length - len(completion)) :]
    room = max_length - len(prompt)
    return prompt, completion if len(completion) <= room else [*completion[: room - 1], completion[-1]]


def completion_text(completion: Text) -> str:
    """The text of a completion given as a string or as one assistant message."""
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
    """(ids, mask), both (rows, longest), int64; the mask is 1 on real tokens."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids, mask
