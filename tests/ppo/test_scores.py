"""Scores of tokens: normalized by the sums of responses, clipped one by one, the EOS charged on the last."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ppo.scores import normalize_scores, stack_rewards
from pipeline.reward.functions import RewardSource

PLAIN = {"score_normalization": "none", "score_clip": None, "missing_eos_penalty": 0.0}
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()


def normalize(rewards, ended=(True, True), mean=0.0, std=1.0, sums=None, mask=MASK, **settings):
    sums = torch.zeros(3, dtype=torch.float64) if sums is None else sums
    args, source = SimpleNamespace(**PLAIN | settings), RewardSource(lambda **_: [], mean, std)
    return normalize_scores(stack_rewards(rewards, mask), mask, list(ended), args, source, sums, lambda x: x)


def test_a_number_is_on_the_last_token():
    raw = stack_rewards([2.5, [1.0, -1.0]], MASK)
    assert raw.tolist() == [[0, 0, 2.5], [1, -1, 0]]
    assert raw.dtype == torch.float64


def test_the_mean_comes_off_the_last_token_and_all_are_divided_by_the_deviation():
    # the sums are 7 and 2; (7 − 3) / 2 = 2 and (2 − 3) / 2 = −½
    scores = normalize([[1.0, 2.0, 4.0], [0.0, 2.0]], mean=3.0, std=2.0, score_normalization="reference")
    assert scores.tolist() == [[0.5, 1.0, 0.5], [0.0, -0.5, 0.0]]
    assert scores.sum(1).tolist() == [2.0, -0.5]


def test_running_statistics_are_those_of_the_sums():
    sums = torch.zeros(3, dtype=torch.float64)
    scores = normalize([[1.0, 0.0, 4.0], 1.0], score_normalization="running", sums=sums)
    assert sums.tolist() == [2, 6, 26]  # 5 and 1: the mean is 3, the deviation 2
    assert scores.tolist() == [[0.5, 0.0, 0.5], [0.0, -1.0, 0.0]]


def test_each_token_is_clipped_and_then_the_last_pays_for_a_missing_eos():
    scores = normalize(
        [[3.0, -3.0, 0.5], [0.25, 9.0]], ended=(True, False), score_clip=1.0, missing_eos_penalty=0.75
    )
    assert scores.tolist() == [[1.0, -1.0, 0.5], [0.25, 0.25, 0.0]]


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2),
    st.sampled_from(["none", "reference", "running"]),
    st.tuples(st.booleans(), st.booleans()),
)
def test_a_number_and_its_token_rewards_are_the_same_bits(numbers, normalization, ended):
    settings = {"score_normalization": normalization, "score_clip": 2.0, "missing_eos_penalty": 0.3}
    settings |= {"mean": 0.1, "std": 0.7, "ended": ended}
    expected = normalize(numbers, **settings)
    assert torch.equal(normalize([[0, 0, numbers[0]], numbers[1]], **settings), expected)
    assert torch.equal(normalize([[0, 0, numbers[0]], [0, numbers[1]]], **settings), expected)
    assert expected[MASK].numel() == 5
    assert not expected[~MASK].any()


def test_a_response_without_tokens_has_no_score():
    mask = torch.tensor([[True, True], [False, False]])
    scores = normalize([1.0, 5.0], mask=mask, ended=(True, False), missing_eos_penalty=1.0)
    assert scores.tolist() == [[0.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("normalization", ["none", "reference"])
def test_a_reward_that_never_varies_is_not_divided_by_zero(normalization):
    scores = normalize([2.0, 2.0], mean=2.0, std=0.0, score_normalization=normalization)
    assert scores.sum(1).tolist() == ([2.0, 2.0] if normalization == "none" else [0.0, 0.0])
