"""A reward function gets copies and returns numbers; whatever else it does is one line with its place."""

import copy
import sys
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli
from pipeline.errors import UserError
from pipeline.reward.calls import call_reward_function
from pipeline.reward.functions import RewardSource, combine_rewards, import_function

BATCH = {
    "prompts": [[{"role": "user", "content": "Hi."}], "q"],
    "completions": ["a", "bb"],
    "completion_ids": [[1], [1, 2]],
    "ended": [True, False],
}
COLUMNS = {"answer": [{"text": ["a"]}, {"text": ["b"]}], "rank": [1, 2]}


def call(returned):
    return call_reward_function(lambda **_: returned, *BATCH.values(), COLUMNS)


def spoil(prompts, completions, completion_ids, ended, answer, **columns):
    prompts[0][0]["content"] = "changed"
    answer[0]["text"].append("changed")
    for values in (prompts, completions, completion_ids[1], ended, columns["rank"]):
        values[:] = []
    return [1.0, 2.0]


def test_it_gets_copies_of_all_it_is_given():
    batch, columns = copy.deepcopy((BATCH, COLUMNS))
    assert call_reward_function(spoil, *batch.values(), columns) == [1.0, 2.0]
    assert (batch, columns) == (BATCH, COLUMNS)
    both = combine_rewards([RewardSource(spoil), RewardSource(spoil)], [1.0, 10.0])  # so does the second one
    assert call_reward_function(both.score, *batch.values(), columns) == [11.0, 22.0]
    assert (batch, columns) == (BATCH, COLUMNS)


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5],
        (1, 2.5),
        np.array([1.0, 2.5]),
        np.array([1, 2.5], dtype=np.float16),
        torch.tensor([1.0, 2.5], requires_grad=True),
        torch.tensor([1.0, 2.5], dtype=torch.bfloat16),
        [np.float32(1), torch.tensor(2.5)],
        [True, Fraction(5, 2)],
    ],
)
def test_numbers_in_any_sequence_are_scores(returned):
    scores = call(returned)
    assert scores == [1.0, 2.5]
    assert {type(score) for score in scores} == {float}


def test_truth_values_are_scores():
    assert call([True, False]) == call(np.array([1, 2]) == 1) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (None, "a NoneType"),
        (1.0, "a float"),
        ({"a": 1.0, "b": 2.0}, "a dict"),
        ({1.0, 2.0}, "a set"),
        ("12", "a str"),
        (b"12", "a bytes"),
        ((score for score in (1.0, 2.0)), "a generator"),
        (map(float, (1, 2)), "a map"),
        (np.ones((2, 1)), r"a ndarray of shape \(2, 1\)"),
        (torch.ones(2, 2), r"a Tensor of shape \(2, 2\)"),
        (torch.tensor(1.0), r"a Tensor of shape \(\)"),
    ],
)
def test_what_is_no_list_is_named(returned, found):
    expected = rf"^{__name__}:call.*<lambda>: the reward returned {found}; expected a list of 2 numbers$"
    with pytest.raises(UserError, match=expected):
        call(returned)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "None, a NoneType"),
        ("1.5", "'1.5', a str"),
        (b"1", "b'1', a bytes"),
        ([1.0], r"\[1.0\], a list"),
        ({"score": 1}, r"\{'score': 1\}, a dict"),
        (1 + 2j, r"\(1\+2j\), a complex"),
        (np.str_("1"), "'1', a str"),
        (torch.ones(1), r"tensor\(\[1.\]\), a Tensor"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (1e300, r"1e\+300"),
        (-3.5e38, r"-3.5e\+38"),
        (10**400, "1000+…, a int"),
    ],
)
def test_what_is_no_number_is_named_with_its_response(value, found):
    with pytest.raises(UserError, match=f"the reward of the response 'bb' to 'q' is {found}; expected a fin"):
        call([1.0, value])


def test_a_long_response_is_cut_in_an_error():
    with pytest.raises(UserError) as error:
        call_reward_function(lambda **_: [None], ["q" * 10**6], ["a" * 10**6], [[1]], [True], {})
    assert len(str(error.value)) < 700


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_every_fp32_number_comes_back_as_it_is(values):
    assert call(values) == call(np.array(values)) == call(torch.tensor(values)) == values


MODULE = """
import json
def score(prompts, answer, **_):
    return [json.loads(text)["value"] for text in answer]  # line 4
class Judge:
    def __call__(self, **columns):
        return columns["reference"]  # line 7
judge = Judge()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the module of a user, and return its file."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_rewards", raising=False)
    file = tmp_path / "their_rewards.py"
    file.write_text(MODULE)
    return file


def test_an_error_inside_it_names_the_function_the_file_and_the_line(module):
    score, judge = (import_function(f"their_rewards:{name}") for name in ("score", "judge"))
    cases = [
        (score, "{}", "their_rewards:score: the reward failed with KeyError: 'value'", 4),
        (score, "{", "their_rewards:score: the reward failed with JSONDecodeError: Expecting property", 4),
        (judge, "{}", "their_rewards:Judge: the reward failed with KeyError: 'reference'", 7),
        (partial(judge, x=1), "{}", "their_rewards:Judge: the reward failed with KeyError: 'reference'", 7),
    ]
    for function, answer, message, line in cases:
        with pytest.raises(UserError) as error:
            call_reward_function(function, ["q"], ["a"], [[1]], [True], {"answer": [answer]})
        assert str(error.value).startswith(message)
        assert f", at {module}, line {line}; it is called with prompts, completions" in str(error.value)
        assert str(error.value).endswith("completion_ids, ended, answer")
    with pytest.raises(
        UserError, match=r"^their_rewards:score: the reward cannot be called: .*'answer'; it is"
    ):
        call_reward_function(score, ["q"], ["a"], [[1]], [True], {})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1 / 0", "ZeroDivisionError: division by zero, at {file}, line 1"),
        ("\ndef", "SyntaxError: .*line 2"),
    ],
)
def test_a_module_that_fails_when_it_is_imported_is_named_with_its_line(module, code, message):
    module.write_text(code)
    expected = message.format(file=module)
    with pytest.raises(UserError, match=f"^their_rewards:score: cannot be imported: {expected}"):
        import_function("their_rewards:score")


def test_no_memory_is_no_error_of_the_function():
    def score(**_):
        raise MemoryError

    with pytest.raises(MemoryError):
        call_reward_function(score, *BATCH.values(), COLUMNS)


def test_on_the_command_line_it_is_one_line(module, tiny_feedback, tiny_gpt2, tmp_path, capfd):
    (tmp_path / "ppo.yaml").write_text(
        f"run: t\nruns: {tmp_path}\nrecords: {tiny_feedback}\npolicy: {tiny_gpt2}\n"
        "training: {num_rollouts: 1, per_device_train_batch_size: 4, response_tokens: 2}\n"
    )
    argv = ["ppo", "--config", str(tmp_path / "ppo.yaml"), "reward=their_rewards:judge"]
    assert cli.main(argv) == 2
    told = capfd.readouterr().err
    assert f"error: their_rewards:Judge: the reward failed with KeyError: 'reference', at {module}" in told
    assert "Traceback" not in told
    with pytest.raises(UserError):
        cli.main([*argv, "--debug"])


@pytest.mark.parametrize("code", [0, "no"])
def test_a_function_that_exits_is_one_line(code):
    with pytest.raises(UserError, match=r"<lambda>: the reward failed with SystemExit"):
        call_reward_function(lambda **_: sys.exit(code), *BATCH.values(), COLUMNS)
