"""Rewards that are normalized by running statistics, or compared with those of reference responses."""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Reward
from pipeline.errors import UserError
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import RewardSource
from pipeline.reward.parts import read_rewards, restore_scale, write_rewards
from pipeline.reward.references import preference, record_keys
from pipeline.reward.running import RunningStatistics
from pipeline.reward.shaping import shape_source

BATCH = {
    "prompts": ["q", "r"],
    "completions": ["a", "b"],
    "completion_ids": [[1], [1, 2]],
    "ended": [True, True],
}


def shaped(*batches, mean=0.0, std=1.0, **keys):
    """A source whose calls return one of the batches after the other."""
    returned = iter(batches)
    source = RewardSource(lambda prompts, completions, **_: next(returned), mean, std)
    return shape_source(source, Reward(source="x", **keys), "reward (x)", "x")


def test_running_statistics_are_those_of_all_rewards_with_the_batch():
    both = combine_rewards([shaped([1.0, 3.0], [5.0, 7.0], normalize="running")], weights=[10.0])
    assert both.for_training(**BATCH) == [-10.0, 10.0]  # mean 2, deviation 1
    # 1, 3, 5 and 7 have the mean 4 and the variance (9 + 1 + 1 + 9) / 4 = 5
    assert both.for_training(**BATCH) == pytest.approx([10 / 5**0.5, 30 / 5**0.5])
    assert both[1:3] == (0.0, 10.0)


def test_an_evaluation_changes_no_statistics_and_reads_the_first_batch():
    part = shaped([9.0, 9.0], [1.0, 3.0], [5.0, 7.0], [4.0, 2.0], normalize="running")
    both = combine_rewards([part])
    assert both.score(**BATCH) == [0.0, 0.0]  # nothing was seen: its own mean, and no deviation
    running = part.shape.running
    assert (running.count, running.first) == (0, (9.0, 1.0))
    running.first = None
    both.for_training(**BATCH)
    both.for_training(**BATCH)
    before = dict(vars(running))
    assert both.score(**BATCH) == [2.0, 0.0]  # by the mean 2 and the deviation 1
    assert vars(running) == before


def test_no_reward_and_rewards_of_tokens_in_running_statistics():
    none = combine_rewards([shaped([None, 4.0], [None, None], normalize="running")])
    assert none.for_training(**BATCH) == [None, 0.0]
    assert none.for_training(**BATCH) == [None, None]
    # The sums are 1 and 5: mean 3, deviation 2. All tokens are divided, the last one has the mean subtracted.
    tokens = combine_rewards([shaped([1.0, [4.0, 1.0]], normalize="running", clip=1.5)])
    assert tokens.for_training(**BATCH) == [-1.0, [1.5, -1.0]]


@given(st.lists(st.lists(st.integers(-(10**6), 10**6).map(lambda n: n / 64), max_size=6), max_size=6))
def test_running_statistics_agree_with_those_of_the_whole(batches):
    running = RunningStatistics()
    scale = (0.0, 1.0)
    for batch in batches:
        scale = running.find_scale(batch, is_training=True)
    seen = [value for batch in batches for value in batch]
    assert running.count == len(seen)
    if seen:
        assert scale[0] == pytest.approx(statistics.fmean(seen), rel=1e-9, abs=1e-9)
        assert scale[1] == pytest.approx(statistics.pstdev(seen) or 1.0, rel=1e-6, abs=1e-6)


def test_equal_rewards_have_no_deviation_whatever_their_sum_rounds_to():
    assert statistics.fmean([0.1] * 3) != 0.1
    assert RunningStatistics().find_scale([0.1] * 3, is_training=True) == (pytest.approx(0.1), 1.0)


def test_a_small_deviation_far_from_zero_is_kept():
    running = RunningStatistics()
    running.find_scale([1e8, 1e8 + 2], is_training=True)
    assert running.find_scale([1e8 + 1, 1e8 + 1], is_training=True) == (1e8 + 1, 0.5**0.5)


def test_statistics_survive_json_to_the_bit():
    running = RunningStatistics()
    running.find_scale([0.1, 1 / 3, math.pi], is_training=True)
    assert json.loads(json.dumps(vars(running)))["squares"] == running.squares


def test_a_sigmoid_is_the_mean_preference_over_the_references():
    # σ(0) = ½ and σ(ln 3) = 3/4
    assert preference(1.0, [1.0], 1.0) == 0.5
    assert preference(math.log(3), [0.0, math.log(3), None], 1.0) == pytest.approx((0.75 + 0.5) / 2)
    assert preference(2 * math.log(3), [0.0], 2.0) == pytest.approx(0.75)
    assert preference(1.0, [None], 1.0) is None
    assert (preference(1e6, [0.0], 1.0), preference(-1e6, [0.0], 1.0)) == (1.0, 0.0)


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_the_two_preferences_of_a_pair_sum_to_one(a, b):
    assert preference(a, [b], 1.0) + preference(b, [a], 1.0) == pytest.approx(1.0)


def fill(part, columns=None, **scores):
    """Give a part the scores of the references of prompts."""
    keys = record_keys(list(scores), columns or {})
    part.shape.references.scores |= dict(zip(keys, scores.values(), strict=True))
    return part


def test_each_response_is_compared_with_the_references_of_its_prompt():
    one = fill(shaped([1.0, None], [3.0, [2.0, 5.0]], transform="sigmoid"), q=[1.0], r=[7.0])
    both = combine_rewards([one], weights=[2.0])
    assert both.score(**BATCH) == [1.0, None]
    assert both.score(**BATCH) == [pytest.approx(2 / (1 + math.exp(-2))), 1.0]  # 2 + 5 − 7 = 0
    # A reward that is normalized first is divided by the deviation, and its mean cancels.
    wide = fill(
        shaped([2 * math.log(3), 0.0], mean=9.0, std=2.0, transform="sigmoid", normalize="reference"),
        q=[0.0],
        r=[0.0],
    )
    assert combine_rewards([wide]).score(**BATCH) == pytest.approx([0.75, 0.5])


def test_a_running_deviation_is_that_of_the_rewards_and_not_of_the_references():
    part = fill(shaped([0.0, 2.0], normalize="running", transform="sigmoid"), q=[50.0], r=[0.0])
    assert combine_rewards([part]).for_training(**BATCH) == pytest.approx(
        [1 / (1 + math.exp(50)), 1 / (1 + math.exp(-2))]
    )


def test_a_prompt_is_known_by_its_record():
    columns = {"answer": [1, 2], "log_metric": print}
    keys = record_keys(["q", "q"], columns)
    assert len(set(keys)) == 2
    assert keys == record_keys(["q", "q"], {"answer": [1, 2]})
    with pytest.raises(UserError, match="no reference response was sampled for the prompt 'q'"):
        combine_rewards([shaped([1.0, 2.0], transform="sigmoid")]).score(**BATCH)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"references": 2}, "'references' is only read with transform: sigmoid"),
        ({"transform": "sigmoid", "clip": 1.0}, "clip: transform: sigmoid is between 0 and 1 already"),
        ({"transform": "sigmoid", "references": 0}, "greater than 0"),
        ({"transform": "tanh"}, "'none' or 'sigmoid'"),
        ({"normalize": "reference"}, "m:f is a function, which has no reference sample; set normalize: runn"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Reward(source="m:f", **keys)


def test_a_fingerprint_has_the_new_keys_only_where_they_are_set():
    plain = Reward(source="m:f").model_dump(mode="json")
    assert plain.keys().isdisjoint({"transform", "references", "normalize"})
    kept = Reward(source="m:f", transform="sigmoid", references=2, normalize="running").model_dump()
    assert (kept["transform"], kept["references"], kept["normalize"]) == ("sigmoid", 2, "running")


def test_the_parts_of_a_sum_are_written_with_the_scale_of_evaluations(tmp_path):
    sections = [Reward(source="m:f", normalize="running"), Reward(source="m:g", arguments={"a": 1})]
    parts = [shape_source(RewardSource(print), section, "", section.source[-1]) for section in sections]
    write_rewards(tmp_path, sections, ())
    assert read_rewards(tmp_path) == []
    parts[0].shape.running.first = (0.5, 2.0)
    write_rewards(tmp_path, sections, parts)
    rows = read_rewards(tmp_path)
    assert rows == [
        {"source": "m:f", "arguments": None, "name": "f", "mean": 0.5, "std": 2.0},
        {"source": "m:g", "arguments": {"a": 1}, "name": "g", "mean": None, "std": None},
    ]
    parts[0].shape.running.first = None
    restore_scale(parts[0], sections[0], rows, "reward[0] (m:f)")
    assert parts[0].shape.running.first == (0.5, 2.0)
    with pytest.raises(UserError, match=r"^reward\[0\] \(m:f\): normalize: running is by the rewards in tr"):
        restore_scale(parts[0], sections[0], rows[1:], "reward[0] (m:f)")
