"""Several rewards as one: their weighted sum, less what they disagree by."""

import pytest

from pipeline.reward.sources import RewardSource, combine

ANSWERS = {"prompts": ["q", "q"], "completions": ["a", "bb"], "completion_ids": [[1], [1, 2]], "ended": [True, False]}


def source(*scores, mean=0.0, std=1.0):
    return RewardSource(lambda prompts, completions, **_: list(scores), mean, std)


def test_one_is_itself():
    only = source(1.0, 2.0, mean=3.0)
    assert combine([only]) is only


def test_without_weights_the_mean_counts():
    both = combine([source(1.0, 2.0, mean=1.0, std=2.0), source(3.0, 8.0, mean=5.0, std=4.0)])
    assert both.score(**ANSWERS) == [2.0, 5.0]
    assert both[1:3] == (3.0, 3.0)


def test_with_weights_their_sum():
    both = combine([source(1.0, 2.0, mean=1.0, std=2.0), source(3.0, 8.0, mean=5.0, std=4.0)], weights=[1.0, -0.5])
    assert both.score(**ANSWERS) == [-0.5, -2.0]
    assert both[1:3] == (-1.5, 4.0)
    assert combine([source(1.0, 2.0)], weights=[3.0]).score(**ANSWERS) == [3.0, 6.0]


def test_disagreement_costs():
    # by hand: (0, 6, 6) has the mean 4 and the variance (16 + 4 + 4) / 3 = 8; three equal scores have none
    three = [source(0.0, 5.0), source(6.0, 5.0), source(6.0, 5.0)]
    assert combine(three, uncertainty_penalty=0.5).score(**ANSWERS) == pytest.approx([4 - 0.5 * 8**0.5, 5.0])


def test_what_all_answers_of_a_member_share_is_no_disagreement():
    """A reward is known up to a constant alone: one that is 10 above the other everywhere agrees with it."""
    both = combine([source(1.0, 2.0, mean=1.5), source(11.0, 12.0, mean=11.5)], uncertainty_penalty=2.0)
    assert both.score(**ANSWERS) == pytest.approx([6.0, 7.0])


def test_a_member_that_scores_too_few_answers_is_found():
    with pytest.raises(ValueError, match="shorter"):
        combine([source(1.0, 2.0), source(1.0)]).score(**ANSWERS)
