"""The reward of a step is on the token that holds its last character, whatever the tokenizer."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pipeline import StepRewards, place_rewards
from pipeline.errors import UserError
from pipeline.reward.token_rewards import token_ends, total_reward

from ..models.manners import make_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


def fast(core, **names):
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special | names)


def llama2():
    """Words begin with ▁, unknown characters are bytes, and a text loses its first space."""
    words = ["▁", "▁a", "▁b", "a", "b", "=", "▁7+5", "=2", "=2▁2-", "3=9", "é", "\n"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *BYTES, *words])}
    core = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    fuse = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(fuse)
    return fast(core)


def unigram():
    pieces = [*SPECIAL, "▁", "▁7", "+", "5=2", "▁2-", "3", "=9", "▁9+8=7", "é", "▁▁"]
    core = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(core)


def wordpiece():
    """Words are joined by spaces, and cleaned up: `do n't .` is `don't.`."""
    words = ["do", "n", "'", "t", "n't", "7", "+", "5", "=", "2", ".", ",", "##2", "##n", "not", "'s", "é"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    core = Tokenizer(WordPiece(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return fast(core, clean_up_tokenization_spaces=True)


MAKERS = {
    "byte-level": lambda: make_tokenizer("qwen"),
    "byte fallback": llama2,
    "metaspace": unigram,
    "wordpiece": wordpiece,
    "slow": lambda: ByT5Tokenizer(extra_ids=2),
}
tokenizer_of = cache(lambda name: MAKERS[name]())


def place_by_prefixes(tokenizer, ids, text, ends, rewards):
    """The definition: a step is there with the first token after which the text begins with it."""
    placed = [0.0] * len(ids)
    prefixes = [tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids))]
    for end, reward in zip(ends, rewards, strict=True):
        placed[next(i for i, prefix in enumerate(prefixes) if prefix.startswith(text[:end]))] += reward
    return placed


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
def test_any_ids_of_any_tokenizer_are_placed_by_their_prefixes(name, data):
    """Ids that no text has, special tokens among them, with an end or cut at the limit."""
    tokenizer = tokenizer_of(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ids += [tokenizer.eos_token_id] if data.draw(st.booleans()) else []
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    rewards = [2.0**step for step in range(len(ends))]
    placed = place_rewards(tokenizer, ids, text, ends, rewards)
    assert placed == place_by_prefixes(tokenizer, ids, text, ends, rewards)
    assert sum(placed) == sum(rewards)
    if text and ids[-1] == tokenizer.eos_token_id:
        assert placed[-1] == 0


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["▁7+5", "=2", "▁", "<0x32>", "<0x2D>", "3=9"], [0, 1, 0, 0, 0, -1]),  # spelled by bytes
        (["▁7+5", "=2▁2-", "3=9"], [0, 1, -1]),  # the first step ends inside a token
        (["▁7+5", "=2▁2-", "3=9", "</s>"], [0, 1, -1, 0]),  # the end has no reward
        (["<s>", "▁7+5", "<s>", "=2", "</s>", "▁", "<0x32>", "<0x2D>", "3=9"], [0, 0, 0, 1, 0, 0, 0, 0, -1]),
    ],
)
def test_by_hand(tokens, expected):
    tokenizer = tokenizer_of("byte fallback")
    assert place_rewards(tokenizer, ids_of(tokenizer, *tokens), "7+5=2 2-3=9", [5, 11], [1, -1]) == expected


def test_a_character_is_there_with_its_last_byte():
    tokenizer = tokenizer_of("byte fallback")
    ids = ids_of(tokenizer, "a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "b")
    assert place_rewards(tokenizer, ids, "a😀b", ["a", "😀", "b"], [1, 2, 4]) == [1, 0, 0, 0, 2, 4]
    cut = ids[:3]  # at the limit
    assert place_rewards(tokenizer, cut, tokenizer.decode(cut), [1, 3], [1, 2]) == [1, 0, 2]


def test_an_end_that_is_no_special_token_has_no_reward():
    tokenizer = tokenizer_of("byte fallback")
    ids = ids_of(tokenizer, "a", "b", "\n")  # ended by the stop token "\n", which is not in the text
    assert place_rewards(tokenizer, ids, "ab", [1, 2], [1, 2]) == [1, 2, 0]


def test_steps_that_end_in_one_token_add_up_and_texts_are_found_in_order():
    tokenizer = tokenizer_of("byte fallback")
    ids = ids_of(tokenizer, "▁7+5", "=2▁2-", "3=9")
    assert place_rewards(tokenizer, ids, "7+5=2 2-3=9", ["2", "2", "9"], [1.0, 0.25, 4.0]) == [0, 1.25, 4.0]
    assert place_rewards(tokenizer, ids, "7+5=2 2-3=9", [0, 0], [1.0, 2.0]) == [3.0, 0, 0]
    assert place_rewards(tokenizer, ids, "7+5=2 2-3=9", torch.tensor([5]), torch.ones(1)) == [0, 1, 0]
    assert place_rewards(tokenizer, ids, "7+5=2 2-3=9", [], []) == [0, 0, 0]
    assert place_rewards(tokenizer, [tokenizer.eos_token_id], "", [0], [1.0]) == [
        1.0
    ]  # it has no other token


def test_the_time_is_linear():
    tokenizer, decoded = make_tokenizer("qwen"), []
    ids = tokenizer("Name a fruit. 😀 An apple. " * 40)["input_ids"]
    text, decode = tokenizer.decode(ids), tokenizer.decode
    tokenizer.decode = lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options)
    assert token_ends(tokenizer, ids, text)[-1] == len(text)
    assert sum(decoded) < 6 * len(ids)


@pytest.mark.parametrize(
    ("steps", "rewards", "problem"),
    [
        ([5], [1.0, 2.0], "the response '7[+]5=2' has 2 rewards for 1 steps; expected one per step"),
        (
            [2, 1],
            [1.0, 2.0],
            "step 2 of 2 of the response '7[+]5=2': it ends at character 1; expected 2 to 5",
        ),
        ([6], [1.0], "step 1 of 1 of the response '7[+]5=2': it ends at character 6; expected 0 to 5"),
        ([-1], [1.0], "step 1 of 1 of the response .* it ends at character -1; expected 0 to 5"),
        ([2.5], [1.0], "step 1 of 1 .* it ends at 2.5; expected the offset of a character, or the text of"),
        (
            ["=", "5"],
            [1.0, 2.0],
            "step 2 of 2 .* its text '5' is not there from character 4 on; expected the",
        ),
        ([3, 5], [1.0, float("nan")], "step 2 of 2 .*: its reward is nan; expected a finite number"),
        ([3, 5], [None, 1.0], "step 1 of 2 .*: its reward is None; expected a finite number"),
        ("7", [1.0], "steps is a str; expected a list"),
        ([5], 1.0, "rewards is a float; expected a list"),
    ],
)
def test_a_wrong_step_is_named_with_its_response(steps, rewards, problem):
    tokenizer = tokenizer_of("byte fallback")
    with pytest.raises(UserError, match=f"^{problem}"):
        place_rewards(tokenizer, ids_of(tokenizer, "▁7+5", "=2"), "7+5=2", steps, rewards)


def test_a_text_of_other_ids_is_an_error():
    tokenizer = tokenizer_of("byte fallback")
    for ids in (ids_of(tokenizer, "a", "b"), ids_of(tokenizer, "▁7+5"), []):
        with pytest.raises(UserError, match=f"the response '7.*' is not what its {len(ids)} completion_ids"):
            place_rewards(tokenizer, ids, "7+5=2", [5], [1.0])


def test_the_total_is_the_sum_of_tokens_or_steps():
    assert (
        total_reward(2.5) == total_reward([0.0, 2.5]) == total_reward(StepRewards([1.0, 1.5], [1, 2])) == 2.5
    )
    assert total_reward([1e16, 1.0, -1e16]) == 1.0
