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
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import RewardSource
from pipeline.reward.importing import import_function
from pipeline.reward.token_rewards import StepRewards

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
        (np.ones((2, 1, 1)), r"a ndarray of shape \(2, 1, 1\)"),
        (StepRewards([1.0, 1.0], [1, 2]), "a StepRewards"),
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
        ("1.5", "'1.5', a str"),
        (b"1", "b'1', a bytes"),
        ({"score": 1}, r"\{'score': 1\}, a dict"),
        (1 + 2j, r"\(1\+2j\), a complex"),
        (np.str_("1"), "'1', a str"),
        (torch.ones(1, 1), r"tensor\(\[\[1.\]\]\), a Tensor"),
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


@pytest.mark.parametrize(
    "returned",
    [
        [[1], [2, 3.5]],
        ([1.0], (2.0, 3.5)),
        [np.array([1.0]), torch.tensor([2.0, 3.5])],
        [[torch.tensor(1.0)], [np.float32(2), Fraction(7, 2)]],
    ],
)
def test_one_number_per_token_is_rewards_inside_the_response(returned):
    rewards = call(returned)
    assert rewards == [[1.0], [2.0, 3.5]]
    assert {type(value) for row in rewards for value in row} == {float}


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_rows_of_an_array_are_token_rewards(array):
    batch = BATCH | {"completion_ids": [[1, 2], [3, 4]]}
    rows = [[1.0, 2.0], [0.0, -1.0]]
    assert call_reward_function(lambda **_: array(rows), *batch.values(), COLUMNS) == rows


def test_each_response_has_its_own_kind_of_reward():
    assert call([0.5, [1, 2]]) == [0.5, [1.0, 2.0]]
    assert call([[0.5], StepRewards([1, 2], [1, 2])]) == [[0.5], 3.0]  # no tokenizer places them


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([1.0], "the reward of the response 'bb' to 'q' has 1 numbers for 2 tokens; expected one number, or"),
        (torch.ones(3), "the reward of the response 'bb' to 'q' has 3 numbers for 2 tokens"),
        ([], "the reward of the response 'bb' to 'q' has 0 numbers for 2 tokens"),
        (
            [1.0, float("nan")],
            "the reward of token 2 of 2 of the response 'bb' to 'q' is nan; expected a fin",
        ),
        ([[1.0], [2.0]], r"the reward of token 1 of 2 of the response 'bb' to 'q' is \[1.0\]; expected"),
        ([3e38, 3e38], r"the rewards of the response 'bb' to 'q' sum to 6e\+38; expected a finite number"),
        (
            StepRewards([1.0], [3]),
            "step 1 of 1 of the response 'bb': it ends at character 3; expected 0 to 2",
        ),
        (StepRewards([3e38, 3e38], [1, 2]), r"the rewards of the response 'bb' to 'q' sum to 6e\+38"),
    ],
)
def test_wrong_token_rewards_are_named_with_their_response(value, problem):
    with pytest.raises(UserError, match=f"^{__name__}:call.*<lambda>: {problem}"):
        call([1.0, value])


def test_a_mistake_inside_the_function_names_the_function(module):
    module.write_text(
        "from pipeline import place_rewards\n"
        "def score(completions, completion_ids, **_):\n"
        "    return [place_rewards(None, completion_ids[0], completions[0], ['b'], [1.0])]\n"
    )
    with pytest.raises(
        UserError, match=r"^their_rewards:score: step 1 of 1 of the response 'a': its text 'b'"
    ):
        call_reward_function(import_function("their_rewards:score"), ["q"], ["a"], [[1]], [True], {})


def test_a_long_response_is_cut_in_an_error():
    with pytest.raises(UserError) as error:
        call_reward_function(lambda **_: ["b"], ["q" * 10**6], ["a" * 10**6], [[1]], [True], {})
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
    assert (
        f"error: reward (their_rewards:judge): the reward failed with KeyError: 'reference', at {module}"
        in told
    )
    assert "Traceback" not in told
    with pytest.raises(UserError):
        cli.main([*argv, "--debug"])


@pytest.mark.parametrize("code", [0, "no"])
def test_a_function_that_exits_is_one_line(code):
    with pytest.raises(UserError, match=r"<lambda>: the reward failed with SystemExit"):
        call_reward_function(lambda **_: sys.exit(code), *BATCH.values(), COLUMNS)
