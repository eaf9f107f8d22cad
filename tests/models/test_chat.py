"""One encoding of a prompt and a completion: what truncation keeps, and where the EOS is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Scratch
from pipeline.errors import UserError
from pipeline.models.chat import completion_ids, encode_pair, pad_rows, prompt_ids, truncate
from pipeline.models.scratch import new_policy

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"]
SIZE = Scratch(layers=1, width=8, heads=1, vocabulary=300, positions=64)
TOKENIZER = new_policy(TEXTS, SIZE, "\n")[1]
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
IDS = st.lists(st.integers(0, 9), max_size=15)
EOS = 99


def test_prompt_ids_do_not_depend_on_the_completion() -> None:
    tokenizer = new_policy(TEXTS, SIZE, separator="")[1]  # nothing keeps the two apart but the encoding
    together = tokenizer("the cat")["input_ids"]
    prompts = {
        tuple(encode_pair(tokenizer, "the ca", completion, 64)[0])
        for completion in ("t", "t sat", " dog", "")
    }
    assert prompts == {tuple(prompt_ids(tokenizer, "the ca"))}
    assert together != [*prompt_ids(tokenizer, "the ca"), *completion_ids(tokenizer, "t")[:-1]]


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS)
def test_text_survives_and_eos_is_last(prompt: str, completion: str) -> None:
    before, after = encode_pair(TOKENIZER, prompt, completion, 10_000)
    assert TOKENIZER.decode(before) == prompt + "\n"
    assert TOKENIZER.decode(after[:-1]) == completion
    assert after[-1] == TOKENIZER.eos_token_id
    assert after.count(TOKENIZER.eos_token_id) == 1


def test_messages_and_strings_are_the_same_text() -> None:
    turn = [{"role": "user", "content": "the cat"}]
    assert prompt_ids(TOKENIZER, turn) == prompt_ids(TOKENIZER, "the cat")
    answer = [{"role": "assistant", "content": "sat"}]
    assert completion_ids(TOKENIZER, answer) == completion_ids(TOKENIZER, "sat")
    dialogue = [*turn, *answer, {"role": "user", "content": "on?"}]
    assert TOKENIZER.decode(prompt_ids(TOKENIZER, dialogue)) == f"the cat\nsat{TOKENIZER.eos_token}on?\n"


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "a"}] * 2])
def test_a_completion_is_one_message(messages: list[dict[str, str]]) -> None:
    with pytest.raises(UserError, match=f"{len(messages)} messages"):
        completion_ids(TOKENIZER, messages)


@given(IDS, IDS, st.integers(2, 20))
def test_truncate_shortens_the_start_of_the_prompt_then_the_end_of_the_completion(
    prompt: list[int], answer: list[int], max_length: int
) -> None:
    completion = [*answer, EOS]
    short_prompt, short_completion = truncate(prompt, completion, max_length)
    assert len(short_prompt) + len(short_completion) == min(max_length, len(prompt) + len(completion))
    assert short_prompt == prompt[len(prompt) - len(short_prompt) :]
    assert short_completion == [*answer[: len(short_completion) - 1], EOS]
    if len(short_completion) < len(completion):
        assert len(short_prompt) == min(1, len(prompt))


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(9, ([1, 2, 3], [4, 5, EOS])), (5, ([2, 3], [4, 5, EOS])), (3, ([3], [4, EOS])), (2, ([3], [EOS]))],
)
def test_truncate_by_hand(max_length: int, expected: tuple[list[int], list[int]]) -> None:
    assert truncate([1, 2, 3], [4, 5, EOS], max_length) == expected


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[1, 2, 3], [4, 7, 7], [7, 7, 7]], [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        ("left", [[1, 2, 3], [7, 7, 4], [7, 7, 7]], [[1, 1, 1], [0, 0, 1], [0, 0, 0]]),
    ],
)
def test_pad(side: str, ids: list[list[int]], mask: list[list[int]]) -> None:
    assert [tensor.tolist() for tensor in pad_rows([[1, 2, 3], [4], []], 7, side)] == [ids, mask]
