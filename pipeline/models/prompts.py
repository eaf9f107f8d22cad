"""Prompts to the token ids that a policy responds to: which ones fit, and what is cut of the others."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import Text
from pipeline.distributed.processes import is_main_process
from pipeline.errors import UserError, explain_row
from pipeline.models.chat import cut_prompt, prompt_ids


def prepare_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], max_tokens: int, side: str = "left"
) -> list[list[int]]:
    """Return the token ids of each prompt; a longer one loses its beginning, or by `side` its end.

    A template may render an empty prompt to nothing. The response then follows EOS, as it does in training.
    """
    return [
        cut_prompt(tokenizer, prompt_ids(tokenizer, prompt), max_tokens, side) or [tokenizer.eos_token_id]
        for prompt in prompts
    ]


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase, data: Dataset, max_tokens: int, overlong: str, name: str
) -> Dataset:
    """Return the rows whose prompt fits, or without `overlong: drop` all, and print how many do not fit.

    `name` says whose prompts they are. Raises `UserError` if no row is left, or names the row that the chat
    template refuses.
    """
    fitting = []
    for number, prompt in enumerate(data["prompt"]):
        with explain_row(f"{name}: row {number}"):
            if len(prompt_ids(tokenizer, prompt)) <= max_tokens:
                fitting.append(number)
    over = len(data) - len(fitting)
    if over and is_main_process():
        print(f"  {name}: over {max_tokens} tokens (overlong: {overlong}): {over:,} of {len(data):,}")
    if not over or overlong != "drop":
        return data
    if not fitting:
        raise UserError(f"{name}: none has at most {max_tokens} tokens; raise max_prompt_tokens")
    return data.select(fitting)


def truncation_side(overlong: str) -> str:
    """Return the side that a value of `overlong` cuts."""
    return "right" if overlong == "truncate_right" else "left"
