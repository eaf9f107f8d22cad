"""Several rewards as one: their weighted sum, less what they disagree by."""

import pytest
from datasets import Dataset

from pipeline.config import PPOStage
from pipeline.errors import UserError
from pipeline.reward.evaluation import reference_statistics
from pipeline.reward.functions import RewardSource, combine_rewards, reward_from_model
from pipeline.reward.settings import RewardSettings
from pipeline.reward.token_rewards import StepRewards

ANSWERS = {
    "prompts": ["q", "q"],
    "completions": ["a", "bb"],
    "completion_ids": [[1], [1, 2]],
    "ended": [True, False],
}


def source(*scores, mean=0.0, std=1.0):
    return RewardSource(lambda prompts, completions, **_: list(scores), mean, std)


def test_one_is_itself():
    only = source(1.0, 2.0, mean=3.0)
    assert combine_rewards([only]) is only


def test_without_weights_the_mean_counts():
    both = combine_rewards([source(1.0, 2.0, mean=1.0, std=2.0), source(3.0, 8.0, mean=5.0, std=4.0)])
    assert both.score(**ANSWERS) == [2.0, 5.0]
    assert both[1:3] == (3.0, 3.0)


def test_with_weights_their_sum():
    both = combine_rewards(
        [source(1.0, 2.0, mean=1.0, std=2.0), source(3.0, 8.0, mean=5.0, std=4.0)], weights=[1.0, -0.5]
    )
    assert both.score(**ANSWERS) == [-0.5, -2.0]
    assert both[1:3] == (-1.5, 4.0)
    assert combine_rewards([source(1.0, 2.0)], weights=[3.0]).score(**ANSWERS) == [3.0, 6.0]


def test_disagreement_costs():
    # by hand: (0, 6, 6) has the mean 4 and the variance (16 + 4 + 4) / 3 = 8; three equal scores have none
    three = [source(0.0, 5.0), source(6.0, 5.0), source(6.0, 5.0)]
    assert combine_rewards(three, uncertainty_penalty=0.5).score(**ANSWERS) == pytest.approx(
        [4 - 0.5 * 8**0.5, 5.0]
    )


def test_what_all_answers_of_a_member_share_is_no_disagreement():
    """A reward is known up to a constant alone: one that is 10 above the other everywhere agrees with it."""
    both = combine_rewards(
        [source(1.0, 2.0, mean=1.5), source(11.0, 12.0, mean=11.5)], uncertainty_penalty=2.0
    )
    assert both.score(**ANSWERS) == pytest.approx([6.0, 7.0])


def test_a_member_that_scores_too_few_answers_is_found():
    with pytest.raises(UserError, match="the reward returned 1 scores for 2 responses"):
        combine_rewards([source(1.0, 2.0), source(1.0)]).score(**ANSWERS)


def test_rewards_inside_a_response_are_summed_token_by_token():
    """A response of one token and one of two: a number is on the last of them."""
    both = combine_rewards([source(3.0, [1.0, 4.0]), source([5.0], 8.0)], weights=[1.0, -0.5])
    assert both.score(**ANSWERS) == [[0.5], [1.0, 0.0]]
    plain, spread = source(0.1, 0.7), source([0.1], [0.0, 0.7])
    numbers = combine_rewards([plain, plain], weights=[0.3, 0.9]).score(**ANSWERS)
    assert combine_rewards([spread, plain], weights=[0.3, 0.9]).score(**ANSWERS) == [
        [numbers[0]],
        [0.0, numbers[1]],
    ]


def test_disagreement_about_the_sums_costs_on_the_last_token():
    # the sums of the second response are 5 and 9: their deviation is 2, less 1 for what the means differ by
    both = combine_rewards([source(1.0, [2.0, 3.0]), source(1.0, 9.0, mean=2.0)], uncertainty_penalty=0.25)
    assert both.score(**ANSWERS) == [1.0 - 0.25, [1.0, 1.5 + 4.5 - 0.25]]


def test_steps_are_placed_before_they_are_summed(tiny_tokenizer):
    text = "Rome. Paris."
    ids = tiny_tokenizer(text)["input_ids"]
    answers = {"prompts": ["q"], "completions": [text], "completion_ids": [ids], "ended": [False]}
    sources = [source(StepRewards([1.0, 3.0], [5, 12])), source(4.0)]
    (row,) = combine_rewards(sources, [1.0, 1.0], tokenizer=tiny_tokenizer).score(**answers)
    first = next(i for i in range(len(ids)) if tiny_tokenizer.decode(ids[: i + 1]) == "Rome.")
    assert row == [1.0 if i == first else 7.0 if i == len(ids) - 1 else 0.0 for i in range(len(ids))]
    assert combine_rewards(sources, [1.0, 1.0]).score(**answers) == [8.0]


class Wordy:
    """A reward model that likes words, 0.5 each, and prompts about cats."""

    def __init__(self, **known):
        self.settings = RewardSettings(alpha=2.0, **known)

    def lengths(self, responses):
        return [len(response.split()) for response in responses]

    def score(self, prompts, responses, alpha=None):
        alpha = self.settings.alpha if alpha is None else alpha
        return [
            alpha * (0.5 * n + 3 * ("cat" in p))
            for p, n in zip(prompts, self.lengths(responses), strict=True)
        ]


def test_what_a_token_is_worth_is_fitted_within_prompts():
    """Answers about cats are longer and better liked for the cats: that is no worth of their length."""
    pairs = Dataset.from_list(
        [
            {"prompt": "a cat", "chosen": "a b c d e f", "rejected": "a b c d"},
            {"prompt": "a dog", "chosen": "a", "rejected": "a b"},
        ]
    )
    found = reference_statistics(Wordy(), pairs)
    assert found == pytest.approx(
        {"reward_mean": 3.125, "reward_std": 2.40767, "length_mean": 3.25, "length_slope": 0.5}, abs=1e-5
    )
    alone = Dataset.from_list(
        [{"prompt": "a dog", "completion": "a"}, {"prompt": "a dog", "completion": "a b c"}]
    )
    assert reference_statistics(Wordy(), alone)["length_slope"] == 0.5


def test_a_length_penalty_takes_off_what_length_is_worth():
    known = {"reward_mean": 2.0, "reward_std": 1.0, "length_mean": 2.0, "length_slope": 0.5}
    asked = {"prompts": ["dog", "dog"], "completions": ["a", "a b c d"]}
    plain, half, all_of_it = (reward_from_model(Wordy(**known), share) for share in (0.0, 0.5, 1.0))
    assert plain.score(**asked) == [1.0, 4.0]
    assert half.score(**asked) == [1.5, 3.0]
    assert all_of_it.score(**asked) == [2.0, 2.0]
    assert all_of_it.mean == 4.0
    with pytest.raises(UserError, match="length_penalty: this reward model has no reference sample"):
        reward_from_model(Wordy(), 1.0)


def test_a_function_takes_no_length_penalty():
    with pytest.raises(ValueError, match="math:sqrt is a function"):
        PPOStage(run="t", reward={"source": "math:sqrt", "length_penalty": 1.0})
