"""Intervals against published values, hand-worked ones, scipy's bootstrap, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm, t

from pipeline.reward import weighted
from pipeline.reward.intervals import bootstrap_interval, wilson_interval
from pipeline.reward.metrics import label_metrics, pair_metrics, ranking_metrics, rating_metrics


@pytest.mark.parametrize(
    ("wins", "rows", "expected"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_the_interval_of_a_share_is_that_of_newcombe_1998(wins, rows, expected):
    """Table I, method 3."""
    assert wilson_interval(wins / rows, rows) == pytest.approx(expected, abs=5e-5)


# Student's t of the means of prompts


def test_two_prompts_by_hand():
    """Their means are 1 and 3. Resamples have the means 1, 2, 2, 3: a variance of ½, unbiased 1."""
    half = 12.706  # the t-distribution's 97.5 % quantile with one degree of freedom
    found = bootstrap_interval(weighted.mean, [[0, 2, 3, 3]], ["a", "a", "b", "b"])
    assert found == pytest.approx([2 - half, 2 + half], rel=0.04)
    # A logit's slope is 1 / (share (1 − share)), here of a share of ½ between 0 and 4, and 4 of these.
    low, high = bootstrap_interval(weighted.mean, [[0, 2, 3, 3]], ["a", "a", "b", "b"], 0.0, 4.0)
    assert (low, high) == pytest.approx((4 / (1 + math.exp(half)), 4 / (1 + math.exp(-half))), rel=0.5)
    # A logarithm's is 1 / value, here 1 / 2.
    low, high = bootstrap_interval(weighted.mean, [[0, 2, 3, 3]], ["a", "a", "b", "b"], 0.0)
    assert math.log(high / low) == pytest.approx(half, rel=0.04)


def test_the_standard_error_is_that_of_scipy():
    """Scipy resamples a column of prompts, each with the sum and the number of its rows."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(20), rng.integers(1, 6, 20))
    values = rng.normal(size=20)[groups] + rng.normal(size=len(groups))
    sums, rows = np.bincount(groups, values), np.bincount(groups)
    expected = bootstrap(
        (sums, rows),
        lambda sums, rows, axis: sums.sum(axis) / rows.sum(axis),
        paired=True,
        n_resamples=1000,
        method="percentile",
        rng=0,
    )
    half = t.ppf(0.975, 19) * math.sqrt(20 / 19) * expected.bootstrap_distribution.std()
    mean = values.mean()
    found = bootstrap_interval(weighted.mean, [values], groups)
    assert found == pytest.approx([mean - half, mean + half], rel=1e-9)
    order = rng.permutation(len(groups))
    assert bootstrap_interval(weighted.mean, [values[order]], groups[order]) == pytest.approx(found, rel=1e-9)


def test_rows_without_groups_are_groups_and_prompts_count_instead_of_rows():
    values = np.random.default_rng(0).normal(size=50)
    plain = bootstrap_interval(weighted.mean, [values])
    assert plain == bootstrap_interval(weighted.mean, [values], range(50))
    # Eight equal rows a prompt say what one says.
    copies = bootstrap_interval(weighted.mean, [np.repeat(values, 8)], np.repeat(range(50), 8))
    assert copies == pytest.approx(plain, rel=1e-9)
    rows = bootstrap_interval(weighted.mean, [np.repeat(values, 8)])
    assert np.diff(rows) < np.diff(plain) / 2


# Coverage


def share_of(rng, prompts):
    """Rewards of the chosen response: easy prompts and hard ones. 0.65 of a probit with a variance of 2."""
    easy = np.repeat(rng.normal(0.385 * math.sqrt(2), 1, prompts), 4)
    return weighted.mean, [easy + rng.normal(size=len(easy)) > 0], norm.cdf(0.385), (0.0, 1.0)


def auroc_of(rng, prompts):
    """Good and bad prompts, 2.33 standard deviations apart: 0.95 is near the limit."""
    positive = np.repeat(rng.random(prompts) < 0.5, 4)
    scores = 2.33 * positive + np.repeat(rng.normal(0, 0.8, prompts), 4) + rng.normal(0, 0.6, 4 * prompts)
    return weighted.auroc, [positive, scores], norm.cdf(2.33 / math.sqrt(2)), (0.0, 1.0)


def spearman_of(rng, prompts):
    """Normals with a correlation of ½, both alike within prompts."""
    x, noise = (np.repeat(rng.normal(0, 0.8, prompts), 4) + rng.normal(0, 0.6, 4 * prompts) for _ in range(2))
    return weighted.spearman, [x, 0.5 * x + math.sqrt(0.75) * noise], 6 / math.pi * math.asin(0.25), (-1, 1)


@pytest.mark.parametrize("sample", [share_of, auroc_of, spearman_of])
def test_nineteen_of_twenty_intervals_cover_the_true_value(sample):
    """Of 30 prompts with four rows each, which are alike; by rows far fewer would."""
    rng, covered = np.random.default_rng(0), {"prompts": 0, "rows": 0}
    groups = np.repeat(range(30), 4)
    for _ in range(300):
        statistic, columns, true, limits = sample(rng, 30)
        for name, of in (("prompts", groups), ("rows", None)):
            low, high = bootstrap_interval(statistic, columns, of, *limits)
            covered[name] += low <= true <= high
    assert 0.92 <= covered["prompts"] / 300 <= 0.99
    assert covered["rows"] / 300 < 0.86


# A handful of prompts


def test_all_of_six_pairs_are_no_proof():
    found = pair_metrics([1] * 6, [0] * 6, ([2] * 6, [1] * 6))
    expected = [pytest.approx(0.6097, abs=1e-4), 1]
    assert found["accuracy_interval"] == found["accuracy_longer_interval"] == expected
    twice = pair_metrics([1] * 12, [0] * 12, ([2] * 12, [1] * 12), groups=[*range(6)] * 2)
    assert twice["accuracy_interval"] == expected
    assert "margin_interval" not in twice  # a margin has no limits, and all are 1


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_of_one_prompt_nothing_is_known_but_the_limits(low):
    found = bootstrap_interval(weighted.mean, [[0.5, 1.0, 0.0]], [7] * 3, low, 1.0)
    assert found == pytest.approx([low + (1 - low) * x for x in wilson_interval((0.5 - low) / (1 - low), 1)])
    assert bootstrap_interval(weighted.mean, [[0.5, 1.0, 0.0]], [7] * 3) is None
    assert bootstrap_interval(weighted.rmse, [[0.0, 0.0]], low=0.0) is None


def test_of_few_positive_prompts_an_auroc_knows_little():
    """Of a hundred prompts two are positive: a t of one degree of freedom, against one of 49."""
    rng = np.random.default_rng(3)
    scores = rng.normal(size=100)
    few, many = (
        label_metrics(np.stack([0 * scores, scores], 1), np.arange(100) < n, "ab", 1) for n in (2, 50)
    )
    assert np.diff(few["auroc_interval"]) > 0.9
    assert np.diff(many["auroc_interval"]) < 0.3
    one = label_metrics([[0, 3], [1, 0], [2, 0], [3, 0]], [1, 0, 0, 0], ["no", "yes"], 1)
    assert one["auroc_interval"] == wilson_interval(1.0, 1)


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="empty"):
        bootstrap_interval(weighted.mean, [[]])
    with pytest.raises(ValueError, match=r"a statistic of 2\.5 is not between 0\.0 and 1\.0"):
        bootstrap_interval(weighted.mean, [[2.0, 3.0]], None, 0.0, 1.0)


ROWS = st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=50)
@given(ROWS)
def test_intervals_hold_the_value_within_the_limits_and_have_a_width(rows):
    values, truths, groups = map(np.array, zip(*rows, strict=True))
    for statistic, columns in ((weighted.mean, [values]), (weighted.auroc, [truths, values])):
        value = statistic(np.ones((1, len(rows))), *(column.astype(float) for column in columns))[0]
        if not math.isnan(value):
            low, high = bootstrap_interval(statistic, columns, groups, 0.0, 1.0)
            assert 0 <= low <= value + 1e-9
            assert value - 1e-9 <= high <= 1
            assert high - low > 1e-9


def test_every_ratio_of_a_reward_model_has_its_interval():
    pairs = pair_metrics([3, 2, 1, 4], [0, 3, 0, 1], ([1, 2, 3, 4], [4, 3, 2, 1]))
    labels = label_metrics([[0, 1], [1, 0], [0, 2], [3, 0]], [1, 0, 0, 1], ["no", "yes"], 1)
    rankings = ranking_metrics([[3, 1, 2]] * 5, [[1, 2, 3]] * 5)
    ratings = rating_metrics([1, 2, 3, 4, 6], [1, 2, 3, 5, 4])
    for metrics in (pairs, labels, rankings, ratings):
        names = metrics.keys() - {"pairs", "rows", "rankings", "calibration_error", "confusion"}
        values = {name for name in names if not name.endswith("_interval")}
        assert names - values == {f"{name}_interval" for name in values}
        for name in values:
            low, high = metrics[f"{name}_interval"]
            assert low - 1e-12 <= metrics[name] <= high + 1e-12
            assert low < high
