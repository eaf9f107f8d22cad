"""Several rewards as one: named, normalized and clipped, then summed, less what they disagree by."""

import pytest

from pipeline.config import PPOStage, Reward
from pipeline.config.reward import name_rewards
from pipeline.errors import UserError
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import RewardSource
from pipeline.reward.shaping import shape_reward, shape_source
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


def test_a_reward_is_normalized_and_clipped_before_its_weight():
    wide = shape_source(
        source(16.0, 1.0, mean=6.0, std=5.0),
        Reward(source="a", normalize="reference", clip=1.5),
        "reward[0]",
        "",
    )
    both = combine_rewards([wide, source(0.5, 0.0)], weights=[1.0, 10.0])
    # (16 − 6) / 5 = 2, clipped to 1.5, and (1 − 6) / 5 = −1
    assert both.score(**ANSWERS) == [1.5 + 5.0, -1.0]
    assert (both.mean, both.std) == (0.0, 1.0 + 10.0)
    alone = combine_rewards([wide])
    assert alone.score(**ANSWERS) == [1.5, -1.0]


@pytest.mark.parametrize(
    ("reward", "clip", "expected"),
    [
        (7.0, None, 2.5),
        (7.0, 2.0, 2.0),
        (-7.0, 2.0, -2.0),
        ([4.0, 0.0, 3.0], None, [2.0, 0.0, 0.5]),  # the mean is subtracted on the last token
        ([4.0, 0.0, 3.0], 1.0, [1.0, 0.0, 0.5]),
        ([], 1.0, []),
    ],
)
def test_a_reward_has_the_mean_subtracted_and_is_divided(reward, clip, expected):
    assert shape_reward(reward, mean=2.0, std=2.0, clip=clip) == expected
    if clip is None and reward:
        total = sum(reward) if isinstance(reward, list) else reward
        assert (total - 2.0) / 2.0 == (sum(expected) if isinstance(expected, list) else expected)


def test_no_reward_stays_none_when_it_is_shaped():
    clipped = shape_source(source(None, 9.0), Reward(source="a", clip=1.0), "reward", "")
    assert combine_rewards([clipped]).score(**ANSWERS) == [None, 1.0]


def test_the_disagreement_is_that_of_the_rewards_as_they_count():
    normalized = Reward(source="a", normalize="reference")
    sources = [shape_source(source(12.0, 8.0, mean=10.0, std=2.0), normalized, "a", ""), source(0.0, 0.0)]
    both = combine_rewards(sources, uncertainty_penalty=1.0)
    assert both.score(**ANSWERS) == [0.5 - 0.5, -0.5 - 0.5]  # 1 and 0, −1 and 0


def test_each_reward_is_logged_by_its_name_as_it_was():
    logged = {}
    sources = [
        shape_source(
            source(8.0, 2.0, mean=1.0, std=2.0), Reward(source="a", normalize="reference"), "a", "good"
        ),
        shape_source(source(None, [1.0, 2.0]), Reward(source="b"), "b", "short"),
        source(5.0, 5.0),
    ]
    combine_rewards(sources).score(**ANSWERS, log_metric=logged.__setitem__)
    assert logged == {"rewards/good": 5.0, "rewards/short": 3.0}


def test_a_reward_without_a_reference_sample_is_not_normalized():
    with pytest.raises(UserError, match=r"reward\[1\] \(x\): normalize: reference needs the reference"):
        shape_source(source(1.0), Reward(source="x", normalize="reference"), "reward[1] (x)", "")
    with pytest.raises(ValueError, match="m:f is a function, which has no reference sample"):
        Reward(source="m:f", normalize="reference")


def test_names_are_those_of_functions_and_sources_or_given():
    rewards = [
        Reward(source="m:f"),
        Reward(source="runs/a/reward"),
        Reward(source="m.n:f"),
        Reward(source="m:g"),
    ]
    rewards.append(Reward(source="http://gpu7:8000", name="safe"))
    assert name_rewards(rewards) == ["f[0]", "runs/a/reward", "f[2]", "g", "safe"]


@pytest.mark.parametrize("key", ["weight", "clip", "normalize", "name"])
def test_a_scorer_is_no_part_of_a_sum(key):
    values = {"weight": 1.0, "clip": 1.0, "normalize": "reference", "name": "a"}
    evaluation = {"scorer": {"source": "runs/b/reward", key: values[key]}}
    with pytest.raises(ValueError, match=f"evaluation.scorer.{key} is not read: there is one scorer"):
        PPOStage(run="t", evaluation=evaluation, training={"eval_strategy": "steps"})
