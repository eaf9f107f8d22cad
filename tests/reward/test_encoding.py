"""Text to ids, by hand on a tokenizer of one token per byte, and against the tokenizer's own pair."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.models.scratch import train_tokenizer
from pipeline.reward.encoding import Encoding, check_encoding, encode_response
from tests.models.manners import make_tokenizer

SIZE = config.Scratch(vocabulary=260, positions=128)
DECODER = train_tokenizer([], SIZE, "\n")
ENCODER = train_tokenizer([], SIZE, "\n", encoder=True)
CHAT, PAIR, TEXT = (Encoding(form=form, eos=form == "chat") for form in ("chat", "pair", "concatenation"))


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def cut(how, max_length, side="left"):
    return Encoding(how.form, how.separator, how.eos, side, max_length)


@pytest.mark.parametrize(
    ("tokenizer", "how", "expected", "response_start"),
    [
        (DECODER, CHAT, "ab\ncd<|eos|>", None),
        (ENCODER, PAIR, "[CLS]ab[SEP]cd[SEP]", 4),
        (ENCODER, TEXT, "[CLS]ab\ncd[SEP]", None),
        (DECODER, TEXT, "ab\ncd", None),
        (DECODER, Encoding("concatenation", " ", True), "ab cd<|eos|>", None),
    ],
)
def test_forms(tokenizer, how, expected, response_start):
    found = encode_response(tokenizer, how, "ab", "cd")
    assert text(tokenizer, found.ids) == expected
    assert not found.overlong
    if response_start is not None:
        assert found.response_start == response_start


@pytest.mark.parametrize(
    ("tokenizer", "how", "expected"),
    [
        (DECODER, cut(CHAT, 6), "d\nxyz<|eos|>"),  # the template's separator is the prompt's last token
        (DECODER, cut(CHAT, 4), "\nxy<|eos|>"),
        (DECODER, cut(CHAT, 6, "right"), "abcdx<|eos|>"),
        (DECODER, cut(CHAT, 7, "right"), "abcd\nx<|eos|>"),
        (ENCODER, cut(PAIR, 8), "[CLS]cd[SEP]xyz[SEP]"),
        (ENCODER, cut(PAIR, 6), "[CLS]d[SEP]xy[SEP]"),
        (ENCODER, cut(PAIR, 8, "right"), "[CLS]abcd[SEP]x[SEP]"),
        (ENCODER, cut(PAIR, 5, "right"), "[CLS]a[SEP]x[SEP]"),
        (DECODER, cut(TEXT, 5), "d\nxyz"),
        (DECODER, cut(TEXT, 5, "right"), "abcd\n"),
        (ENCODER, cut(TEXT, 5), "[CLS]xyz[SEP]"),
    ],
)
def test_what_is_cut(tokenizer, how, expected):
    found = encode_response(tokenizer, how, "abcd", "xyz")
    assert text(tokenizer, found.ids) == expected
    assert len(found.ids) == how.max_length
    assert found.overlong


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)
def test_a_pair_is_what_the_tokenizer_itself_makes_of_it(prompt, answer):
    found = encode_response(ENCODER, PAIR, prompt, answer)
    own = ENCODER(prompt, answer, return_token_type_ids=True, split_special_tokens=True)
    assert found.ids == own["input_ids"]
    assert [int(i >= found.response_start) for i in range(len(found.ids))] == own["token_type_ids"]


def test_messages_are_their_text():
    message = [{"role": "user", "content": "ab"}]
    for tokenizer, how in ((DECODER, CHAT), (ENCODER, PAIR), (ENCODER, TEXT)):
        assert encode_response(
            tokenizer, how, message, [{"role": "assistant", "content": "cd"}]
        ) == encode_response(tokenizer, how, "ab", "cd")
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert (
        text(ENCODER, encode_response(ENCODER, PAIR, turns, "cd").ids)
        == "[CLS]system: s\nuser: u[SEP]cd[SEP]"
    )


@pytest.mark.parametrize(
    ("tokenizer", "how", "expected"),
    [
        (DECODER, CHAT, "Q\na<|eos|>R\nb<|eos|>"),
        (DECODER, cut(CHAT, 5), "<|eos|>R\nb<|eos|>"),
        (ENCODER, PAIR, "[CLS]user: Q\nassistant: a\nuser: R[SEP]b[SEP]"),
        (DECODER, TEXT, "user: Q\nassistant: a\nuser: R\nb"),
    ],
)
def test_the_rest_of_a_conversation_is_read_as_the_conversation(tokenizer, how, expected):
    user, answer, asked, last = (
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "QaRb", strict=True)
    )
    found = encode_response(tokenizer, how, "Q", [answer, asked, last])
    assert found == encode_response(tokenizer, how, [user, answer, asked], "b")
    assert text(tokenizer, found.ids) == expected


def test_a_response_that_repeats_its_prompt_is_refused():
    conversation = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match=r"a response of 2 messages \(user, assistant\): expected the first"):
        encode_response(DECODER, CHAT, "Q", conversation)


def test_no_prompt_is_the_answer_alone():
    assert text(ENCODER, encode_response(ENCODER, TEXT, "", "cd").ids) == "[CLS]cd[SEP]"


@pytest.mark.parametrize("odd", ["🙂 émoji", "שלום עולם", "a\r\nb", "word " * 20000])
def test_odd_text_is_read_like_any_other(odd):
    for tokenizer, how in ((DECODER, CHAT), (ENCODER, PAIR), (ENCODER, TEXT)):
        found = encode_response(tokenizer, how, "q", odd)
        assert 3 <= len(found.ids) <= how.max_length
        assert found.overlong == (len(odd) > 512)


def test_a_text_ends_once():
    """The tokenizer itself ends a text with EOS."""
    tokenizer = make_tokenizer("both-ends")
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id
    for max_length in (64, 5):
        how = Encoding("concatenation", eos=True, max_length=max_length)
        ids = encode_response(tokenizer, how, "ab", "cd").ids
        assert len(ids) <= max_length
        assert [ids.count(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)] == [1, 1]
    before = Encoding("concatenation", eos=True, turn="text")
    assert encode_response(tokenizer, before, "ab", "cd").ids[-2:] == [tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("how", [PAIR, TEXT])
def test_special_tokens_in_a_text_are_text(how):
    """BART and T5 take the score at the one EOS of a row, so a second one would end the file."""
    special = set(ENCODER.all_special_ids)
    plain, spelled = (encode_response(ENCODER, how, "ab", text).ids for text in ("cd", "c[SEP]d[CLS]"))
    assert [token for token in spelled if token in special] == [token for token in plain if token in special]
    assert "c[SEP]d[CLS]" in text(ENCODER, spelled)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cut_conversation_keeps_its_bos_and_its_end(tmp_path, side):
    make_tokenizer("gemma").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    whole = encode_response(tokenizer, Encoding(max_length=512), "Q", "A")
    how = Encoding(max_length=len(whole.ids) - 2, truncation=side)
    found = encode_response(tokenizer, how, "Q", "A" if side == "left" else "A" * 9)
    assert (len(found.ids), found.overlong) == (how.max_length, True)
    assert found.ids[0] == tokenizer.bos_token_id
    assert text(tokenizer, found.ids).endswith("<end_of_turn>\n")
    if side == "right":
        assert text(tokenizer, found.ids).startswith("<bos><start_of_turn>user\nQ<end_of_turn>")


def test_eos_must_be_there_where_it_is_wanted():
    with pytest.raises(UserError, match=r"has no EOS token; set encoding\.eos: false"):
        check_encoding(ENCODER, Encoding("chat"), "x")
