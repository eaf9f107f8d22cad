"""Reward models as sources: the share of length in the reward, and what it costs."""

import pytest
from datasets import Dataset

from pipeline.config import PPOStage
from pipeline.errors import UserError
from pipeline.reward.evaluation import reference_statistics
from pipeline.reward.functions import reward_from_model
from pipeline.reward.settings import RewardSettings


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
