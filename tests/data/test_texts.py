"""What is no list of texts is named with the argument and the place."""

import numpy as np
import pytest

from pipeline.data.texts import check_count, check_texts
from pipeline.errors import UserError

MESSAGE = {"role": "user", "content": "Hi."}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "prompts: expected a list of texts, found None"),
        (3, "prompts: expected a list of texts, found 3"),
        ("ab", "prompts: expected a list of texts, found 'ab'; put a single one into a list"),
        (MESSAGE, "prompts: expected a list of texts, found a dict"),
        ([MESSAGE], "prompts: expected a list of texts, found the messages of one; put them into a list"),
        (["a", None], r"prompts\[1\]: expected a string or a list of messages, found None"),
        (["a", 2.5], r"prompts\[1\]: expected a string or a list of messages, found 2.5"),
        ([["Hi."]], r"prompts\[0\]\[0\]: expected a message, .* found 'Hi.'"),
        ([[{"content": "Hi."}]], r"prompts\[0\]\[0\]: expected a message, .* found None as its role"),
        ([[MESSAGE, {"role": "user", "content": [{"type": "text"}]}]], ".*found a list as its content"),
    ],
)
def test_what_is_no_list_of_texts_is_named(values, message):
    with pytest.raises(UserError, match=f"^{message}"):
        check_texts("prompts", values)


@pytest.mark.parametrize("values", [[], ["", "a"], ("a",), [[]], [[MESSAGE]], np.array(["a", "b"])])
def test_lists_of_texts_pass(values):
    check_texts("prompts", values)


@pytest.mark.parametrize("value", [0, -1, 1.5, None, True, "3"])
def test_a_count_is_a_whole_number_above_0(value):
    with pytest.raises(UserError, match=f"^batch_size={value!r}: expected a whole number above 0"):
        check_count("batch_size", value)
