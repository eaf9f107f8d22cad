"""Each spelling of a message is its role and text; what changes what is said has a reason."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.messages import carries_nothing, is_target, preview, read_message
from pipeline.data.schema import RowError


@pytest.mark.parametrize(
    ("message", "role"),
    [
        ({"role": "user", "content": "Q"}, "user"),
        ({"from": "human", "value": "Q"}, "user"),
        ({"from": "gpt", "value": "Q"}, "assistant"),
        ({"from": "observation", "value": "Q"}, "tool"),
        ({"role": " Assistant ", "content": "Q"}, "assistant"),
        ({"role": "developer", "content": "Q"}, "system"),
        ({"role": "prompter", "text": "Q"}, "user"),
        ({"role": "model", "parts": [{"text": "Q"}]}, "assistant"),
        ({"role": "user", "content": [{"type": "text", "text": "Q", "image_url": None}]}, "user"),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "Q"}, {"type": "text", "text": ""}]},
            "user",
        ),
        ({"role": None, "content": None, "from": "human", "value": "Q"}, "user"),
        ({"role": "user", "content": "Q", "value": "Q"}, "user"),
        ({"role": "assistant", "content": "Q", "id": "a1", "name": "Ann", "loss_weight": 1}, "assistant"),
        ({"role": "assistant", "content": "Q", "tool_calls": [], "function_call": None}, "assistant"),
        ({"role": "assistant", "content": "Q", "tool_calls": [{"id": None}], "images": "[]"}, "assistant"),
    ],
)
def test_a_message_is_its_role_and_text(message: dict[str, Any], role: str) -> None:
    assert read_message(message) == {"role": role, "content": "Q"}


def test_parts_of_text_follow_each_other() -> None:
    parts = [{"type": "text", "text": "a b"}, " c", {"text": "d"}]
    assert read_message({"role": "user", "content": parts})["content"] == "a b cd"


@pytest.mark.parametrize(
    ("message", "reason", "detail"),
    [
        ("Q", "not-text", "expected a message, found str"),
        ({"content": "Q"}, "not-text", "needs a role .*found None"),
        ({"role": "narrator", "content": "Q"}, "not-text", "found 'narrator'"),
        ({"role": ["user"], "content": "Q"}, "not-text", r"found \['user'\]"),
        ({"role": "user"}, "not-text", "found NoneType"),
        ({"role": "user", "content": "Q", "value": "R"}, "not-text", "content and value, which differ"),
        ({"role": "user", "content": [3]}, "not-text", "found int"),
        ({"role": "user", "content": [{"type": "text"}]}, "not-text", "has no text"),
        ({"role": "user", "content": [{"type": "image"}]}, "not-only-text", "part of type 'image'"),
        (
            {"role": "user", "content": [{"type": "input_audio"}]},
            "not-only-text",
            "part of type 'input_audio'",
        ),
        ({"role": "user", "content": [{"text": "Q", "image": "x.png"}]}, "not-only-text", "image changes"),
        ({"role": "user", "content": [{"type": "tool_use"}]}, "tool-calls", "part of type 'tool_use'"),
        ({"role": "user", "content": "Q", "images": ["x.png"]}, "not-only-text", r"ignore: \[images\]"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, "tool-calls", "tool_calls"),
        (
            {"role": "assistant", "content": "Q", "function_call": {"name": "f"}},
            "tool-calls",
            "function_call",
        ),
        ({"from": "function_call", "value": "{}"}, "tool-calls", "a message is a function_call"),
        ({"role": "assistant", "content": "Q", "reasoning_content": "So."}, "reasoning", "reasoning_content"),
    ],
)
def test_what_is_said_besides_the_text_has_a_reason(message: Any, reason: str, detail: str) -> None:
    with pytest.raises(RowError, match=detail) as caught:
        read_message(message)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("keys", "target"),
    [
        ({}, True),
        ({"weight": 1, "loss": True, "train": None}, True),
        ({"loss_weight": "1.0", "weight": ""}, True),
        ({"weight": 0}, False),
        ({"loss": False}, False),
        ({"train": "false"}, False),
        ({"weight": 1, "loss_mask": 0}, False),
    ],
)
def test_an_answer_of_weight_0_is_no_target(keys: dict[str, Any], target: bool) -> None:
    assert is_target({"role": "assistant", "content": "a", **keys}) is target


@pytest.mark.parametrize("weight", [0.5, 2, "half", [1], -1, pytest.param(10**5000, id="long")])
def test_another_weight_is_refused(weight: Any) -> None:
    with pytest.raises(RowError, match=r"an answer has weight .*; expected 0 or 1") as caught:
        is_target({"weight": weight})
    assert caught.value.reason == "unread-weight"


def test_what_carries_nothing() -> None:
    assert all(map(carries_nothing, [None, "", " ", "[]", "None", math.nan, [], {}, [None, {"a": [""]}]]))
    assert not any(map(carries_nothing, [0, False, "0", [0], {"a": {"b": 1}}, [[[[[["deep"]]]]]]]))


def test_a_preview_is_short_and_total() -> None:
    assert preview("a" * 5_000_000) == "'" + "a" * 79
    assert preview(10**5000) == "a int"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "image", "weight"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "tool_calls", "weight"]),
        JUNK | st.sampled_from(["user", "gpt"]),
    )
)
def test_a_message_is_read_or_has_a_reason(message: dict[str, Any]) -> None:
    try:
        found = read_message(message)
    except RowError:
        return
    assert found["role"] in ("system", "user", "assistant", "tool")
    assert isinstance(found["content"], str)
    assert read_message(found) == found
