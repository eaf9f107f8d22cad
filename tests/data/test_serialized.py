"""Lists in the text of cells: round trips of three spellings, and texts that only look like them."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.schema import RowError
from pipeline.data.serialized import MAX_CHARACTERS, parse_list, read_list_cell, read_messages_cell

QA = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": 'It\'s "a"\n'}]


def numpy_text(values: list[Any], form: type[str] | Any) -> str:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return str(form(array))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(QA),
        json.dumps(QA, indent=2),
        repr(QA),
        numpy_text(QA, str),
        numpy_text(QA, repr),
        f" {QA!r} ",
    ],
)
def test_messages_in_each_spelling(text: str) -> None:
    assert read_messages_cell(text) == QA


def test_one_message_and_other_names() -> None:
    assert read_messages_cell(repr(QA[1])) == [QA[1]]
    assert read_messages_cell(QA[1]) == [QA[1]]
    shared = [{"id": None, "score": float("nan"), "from": "human", "value": "Q"}]
    assert read_messages_cell(str(shared)) == [{"id": None, "score": None, "from": "human", "value": "Q"}]
    nested = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]
    assert read_messages_cell(repr(nested)) == nested
    inner = "[{'content': array([{'type': 'text', 'text': 'Q'}], dtype=object), 'role': 'user'}]"
    assert read_messages_cell(inner) == nested


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        "[citation needed] Yes.",
        "['a', 'b']",
        "{'a': 1}",
        '{"role": "user"}',
        '[{"from": "A", "value": 3}]',
        '[{"name": "x"}, {"name": "y"}]',
        "[{'name': broken",
        "{{ template }}",
        "[]",
        "",
        "An answer with [{'role': 'user', 'content': 'Q'}] inside.",
    ],
)
def test_a_text_that_only_begins_with_a_bracket_stays_text(text: str) -> None:
    assert read_messages_cell(text) == text


@pytest.mark.parametrize(
    "text",
    [
        repr(QA)[:-3],
        repr(QA) + " and more",
        "[{'role': 'user', 'content': 'Q'}\n ...\n {'role': 'user', 'content': 'Q'}]",
        "[{'role': 'user', 'content': open('x')}]",
        "[" * 60 + "{'role': 'user', 'content': 'Q'}" + "]" * 60,
        repr([{"role": "user", "content": "a" * MAX_CHARACTERS}]),
    ],
)
def test_messages_that_cannot_be_parsed_are_refused(text: str) -> None:
    if text.startswith("[["):
        assert parse_list(text) is None
        return
    with pytest.raises(RowError, match="begins like serialized messages") as caught:
        read_messages_cell(text)
    assert caught.value.reason == "unreadable-list"


def test_json_may_be_long() -> None:
    long = [{"role": "user", "content": "a" * 5_000_000}]
    assert read_messages_cell(json.dumps(long)) == long


def test_lists_of_texts_and_numbers() -> None:
    assert read_list_cell("['a' 'b\\'c'\n 'd']") == ["a", "b'c", "d"]  # numpy's; Python would join the three
    assert read_list_cell("array(['a', 'b'], dtype='<U1')") == ["a", "b"]
    assert read_list_cell("[1 2 10]") == read_list_cell("[1, 2, 10]") == [1, 2, 10]
    assert read_list_cell("[2. 1.]") == [2.0, 1.0]
    assert read_list_cell([1]) == [1]
    assert read_list_cell("a") == "a"
    for text in ("[a, b]", "[1, 2", "[1] [2]"):
        with pytest.raises(RowError, match="begins like a list"):
            read_list_cell(text)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(VALUES))
def test_python_and_json_round_trip(values: list[Any]) -> None:
    assert parse_list(json.dumps(values)) == values
    assert parse_list(repr(values)) == values


@given(st.lists(TEXT, min_size=1, max_size=6))
def test_numpy_round_trip(texts: list[str]) -> None:
    with np.printoptions(threshold=100):
        assert parse_list(numpy_text(texts, str)) == texts
        assert parse_list(numpy_text(texts, repr)) == texts


@given(st.text("[]{}()'\",: \\arr1-n", max_size=40))
def test_any_text_is_parsed_or_is_none(text: str) -> None:
    for junk in (text, f"[{{'{text}"):
        parse_list(junk)
        try:
            found = read_messages_cell(junk)
        except RowError:
            continue
        assert found == junk or all("user" in message.values() for message in found)
