"""Which tokens end a response."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import hub
from pipeline.artifacts.files import read_json
from pipeline.errors import UserError
from pipeline.models.chat import read_markup


def end_token_ids(
    policy: Any, tokenizer: PreTrainedTokenizerBase, stop_token: str | None = None
) -> list[int]:
    """Return the ids that end a response, each once.

    They are the tokenizer's EOS, the token with which the chat template closes a turn, those of the policy's
    generation config, and `stop_token`.
    """
    ids = [tokenizer.eos_token_id, read_markup(tokenizer).end]
    ids += _as_list(policy.generation_config.eos_token_id)
    ids += [stop_token_id(tokenizer, stop_token)] if stop_token else []
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


def declared_ends(source: str, revision: str | None = None) -> list[int]:
    """Return the ids that end a response by the generation config of a folder or hub id, if it has one."""
    file = hub.fetch_file(source, "generation_config.json", revision)
    return _as_list(read_json(file).get("eos_token_id") if file else None)


def declare_ends(policy: Any, ends: Sequence[int]) -> None:
    """Write the ids that end a response into the policy's generation config, which is saved with it."""
    if set(ends) != set(_as_list(policy.generation_config.eos_token_id)):
        policy.generation_config.eos_token_id = list(ends) if len(ends) > 1 else ends[0]


def _as_list(declared: Any) -> list[int]:
    return declared if isinstance(declared, list) else [] if declared is None else [declared]


def stop_token_id(tokenizer: PreTrainedTokenizerBase, stop_token: str) -> int:
    """Return the id of a token that ends a response.

    Raises `UserError` if the tokenizer does not encode it as exactly one token.
    """
    vocabulary = tokenizer.get_vocab()
    # The vocabulary comes first: some tokenizers encode the beginning of a text differently from the rest.
    ids = (
        [vocabulary[stop_token]]
        if stop_token in vocabulary
        else tokenizer(stop_token, add_special_tokens=False)["input_ids"]
    )
    if len(ids) != 1:
        raise UserError(f"stop_token={stop_token!r} is {len(ids)} tokens of this tokenizer; expected one")
    return int(ids[0])
