"""What a reader cannot see makes no difference, and a text of it alone is empty."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.identity import (
    canonical_text,
    is_blank,
    number_questions,
    question,
    visible_identity,
    visible_text,
)
from pipeline.data.schema import RowError

# Format characters that show a sign: marks of Arabic, Syriac and Kaithi numbers.
SHOWN = {0x600, 0x601, 0x602, 0x603, 0x604, 0x605, 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_every_control_and_format_character_is_blank() -> None:
    unseen = (code for code in range(sys.maxunicode) if unicodedata.category(chr(code)) in ("Cc", "Cf"))
    assert [hex(code) for code in unseen if code not in SHOWN and not is_blank(chr(code))] == []


@pytest.mark.parametrize(
    "code", [0xFE0F, 0xE0101, 0x34F, 0x115F, 0x3164, 0xFFA0, 0x2800, 0x17B4, 0x180B, 0x3000]
)
def test_variation_selectors_fillers_and_blanks_are_blank(code: int) -> None:
    assert is_blank(f" {chr(code)}\n")


@given(st.characters(categories=["L", "N", "P", "S"]))
def test_what_is_blank_is_what_shows_nothing(character: str) -> None:
    assert is_blank(character) == (not visible_text(character))
    assert visible_text(f" \u200b{character}\ufeff\r\n") == visible_text(character)


def test_texts_that_look_alike_are_one() -> None:
    assert visible_text("cafe\u0301\r\nof\u00ad fice ") == "café\nof fice"
    assert visible_text("a\n\nb") != visible_text("a b")
    assert visible_identity([{"role": "assistant", "content": "Yes\u200b"}]) == visible_identity("Yes")
    assert visible_identity([user("a"), user("b ")]) == visible_identity([user("a"), user("b")])
    assert visible_identity([user("a"), user("b")]) != visible_identity([user("a"), user("c")])


def test_a_question_has_no_system_turn() -> None:
    asked = {
        question(prompt)
        for prompt in (
            "Qué?",
            " Que\u0301?\r\n",
            [user("Qué?")],
            [{"role": "system", "content": "Be kind."}, user("Qué?\u200b")],
            [{"role": "system", "content": "Be short."}, user("Qué? ")],
        )
    }
    assert asked == {"Qué?"}
    only_system = [{"role": "system", "content": "Be kind."}]
    assert question(only_system) == canonical_text(only_system)
    assert question([user("a"), user("b")]) != question([user("b"), user("a")])


def test_messages_are_the_same_by_role_and_content() -> None:
    assert canonical_text([{"from": "human", "value": "Q", "id": 3}]) == canonical_text("Q") == "Q"
    plain = [user("Q"), {"role": "assistant", "content": "a"}]
    marked = [{**plain[0], "id": "x"}, {**plain[1], "weight": 1, "tool_calls": None}]
    assert canonical_text(plain) == canonical_text(marked)
    assert canonical_text([{"role": "tool", "content": "Q"}]) != "Q"


@pytest.mark.parametrize(
    ("value", "other", "equal"),
    [
        (1, 1.0, True),
        ({"a": [1, {"b": 2.0}]}, {"a": (1.0, {"b": 2})}, True),
        (0, -0.0, True),
        (2**53 + 1, float(2**53), False),
        (1, True, False),
        ([1], ["1"], False),
        ([0.5], [0], False),
        ({1: "a", "b": 2}, {"b": 2.0, 1: "a"}, True),  # keys of two types have no order
    ],
)
def test_equal_numbers_are_one(value: object, other: object, equal: bool) -> None:
    assert (canonical_text(value) == canonical_text(other)) == equal


def test_what_cannot_be_compared_has_a_reason() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**5000):
        with pytest.raises(RowError, match="cannot be compared"):
            canonical_text(value)


def test_rows_of_one_question_share_a_number_and_rows_without_a_question_do_not() -> None:
    asked = ["Why?", [user("Why?")], [{"role": "system", "content": "Be brief."}, user("Why?")], "Why? "]
    assert number_questions(["How?", *asked, "How?"]) == [0, 1, 1, 1, 1, 0]
    assert number_questions(["", "a", None, "", [user(" ")], "a", []]) == [0, 1, 2, 3, 4, 1, 5]
    assert number_questions([]) == []
