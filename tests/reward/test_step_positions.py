"""Where steps end: by hand on a tokenizer of one token per byte, and against decoding the ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.reward.encoding import CUT, Encoding, encode_response
from pipeline.reward.step_positions import last_tokens, text_positions, token_starts
from pipeline.reward.steps import read_steps, split_steps, step_ends
from tests.models.manners import FAMILIES, make_tokenizer
from tests.reward.test_encoding import CHAT, DECODER, ENCODER, PAIR, TEXT, cut


@pytest.mark.parametrize(
    ("response", "text", "ends"),
    [
        ("7+5=2 2-3=9", "7+5=2 2-3=9", [5, 11]),
        (["7+5=2", "2-3=9"], "7+5=2 2-3=9", [5, 11]),
        (" a  b ", " a  b ", [2, 5]),  # pieces without visible text are no steps
        (["a b", ""], "a b ", [3, 4]),  # those of a list are
        ("", "", [0]),
        ("  ", "  ", [2]),
        ([{"role": "assistant", "content": "a b"}], [{"role": "assistant", "content": "a b"}], [1, 3]),
    ],
)
def test_the_steps_of_a_response(response, text, ends):
    assert read_steps(response, " ") == (text, ends)


def test_a_response_without_steps_is_refused():
    with pytest.raises(UserError, match="a response has no steps; expected a text, or a list of one step"):
        read_steps([], " ")


@given(
    st.lists(st.text("ab7+", min_size=1), min_size=1, max_size=5), st.sampled_from(["\n", " ", "\n\n", "->"])
)
def test_splitting_undoes_joining(steps, separator):
    assert split_steps(separator.join(steps), separator) == step_ends(steps, separator)


def test_a_character_belongs_to_the_last_token_that_begins_before_its_end():
    # "ab" "c" "" "de": a token without text, and a step that ends inside the last token
    starts = token_starts([(0, 2), (2, 3), (0, 0), (3, 5)])
    assert starts == [0, 2, 2, 3]
    assert last_tokens(starts, [0, 1, 2, 3, 4, 5]) == [-1, 0, 0, 2, 3, 3]


@pytest.mark.parametrize(
    ("tokenizer", "how", "steps", "held"),
    [
        (DECODER, CHAT, [3, 5], "xy"),  # ab\nx y<|eos|>
        (DECODER, cut(CHAT, 5), [1, 3], "xy"),  # \nx y<|eos|>
        (DECODER, cut(CHAT, 4), [1, CUT], "x"),  # \nx <|eos|>
        (DECODER, cut(CHAT, 5, "right"), [3, CUT], "x"),  # ab\nx<|eos|>
        (ENCODER, PAIR, [4, 6], "xy"),  # [CLS]ab[SEP]x y[SEP]
        (ENCODER, cut(PAIR, 7), [3, 5], "xy"),  # [CLS]b[SEP]x y[SEP]
        (ENCODER, cut(PAIR, 5), [3, CUT], "x"),  # [CLS]b[SEP]x[SEP]
        (ENCODER, cut(PAIR, 7, "right"), [4, CUT], "x"),  # [CLS]ab[SEP]x [SEP]
        (ENCODER, TEXT, [4, 6], "xy"),  # [CLS]ab\nx y[SEP]
        (ENCODER, cut(TEXT, 4), [CUT, 2], "y"),  # [CLS] y[SEP]
        (ENCODER, cut(TEXT, 7, "right"), [4, CUT], "x"),  # [CLS]ab\nx [SEP]
        (DECODER, TEXT, [3, 5], "xy"),
        (DECODER, cut(TEXT, 2), [CUT, 1], "y"),
    ],
)
def test_steps_in_every_form_whole_and_cut(tokenizer, how, steps, held):
    row = encode_response(tokenizer, how, "ab", "x y", [1, 3])
    assert row.steps == steps
    assert "".join(tokenizer.decode([row.ids[position]]) for position in row.positions) == held
    assert row[:3] == encode_response(tokenizer, how, "ab", "x y")[:3]


@pytest.mark.parametrize(("tokenizer", "how"), [(DECODER, CHAT), (ENCODER, PAIR), (DECODER, TEXT)])
def test_a_step_without_a_token_is_judged_at_the_token_before_the_response(tokenizer, how):
    row = encode_response(tokenizer, how, "ab", "", [0])
    expected = {"chat": "\n", "pair": "[SEP]", "concatenation": "\n"}[how.form]
    assert tokenizer.decode([row.ids[row.steps[0]]]) == expected


@given(st.text("ab7+=é😀 \n", min_size=1, max_size=20), st.data())
def test_positions_are_where_decoding_completes_the_character(tiny_tokenizer, text, data):
    end = data.draw(st.integers(1, len(text)))
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    (position,) = text_positions(tiny_tokenizer, text, [end])
    assert not tiny_tokenizer.decode(ids[:position]).startswith(text[:end])
    assert tiny_tokenizer.decode(ids[: position + 1]).startswith(text[:end])


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_the_chats_of_every_family(family, tmp_path):
    make_tokenizer(family).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    text = " 7+5=2\n2-3=9 "
    ends = split_steps(text, "\n")
    row = encode_response(tokenizer, Encoding(max_length=200), "What is 7+5-3?", text, ends)
    for position, shown in zip(row.steps, ("7+5=2", "2-3=9"), strict=True):
        assert tokenizer.decode(row.ids[: position + 1]).rstrip(" ").endswith(shown)
    assert row.steps[0] < row.steps[1] < len(row.ids)
