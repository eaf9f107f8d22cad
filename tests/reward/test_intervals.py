"""Intervals against published values and by simulation; of a handful of rows none has zero width."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reward.intervals import (
    auroc_interval,
    bounded_interval,
    correlation_interval,
    f1_interval,
    interval,
    wilson_interval,
)
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


def test_all_of_six_pairs_are_no_proof():
    found = pair_metrics([1] * 6, [0] * 6, ([2] * 6, [1] * 6))
    assert (
        found["accuracy_interval"]
        == found["accuracy_longer_interval"]
        == [pytest.approx(0.6097, abs=1e-4), 1]
    )
    assert bounded_interval([0.0] * 6) == [0, pytest.approx(0.3903, abs=1e-4)]
    assert bounded_interval([1.0] * 6, -1.0) == [pytest.approx(2 * 0.6097 - 1, abs=1e-4), 1]
    assert bounded_interval([0.0, 1.0, 0.5]) == interval([0.0, 1.0, 0.5])


def test_a_correlation_by_hand():
    # Bonett and Wright: atanh(0.6) = 0.6931, its half width 1.96 √((1 + 0.18) / 25) = 0.4258
    assert correlation_interval(0.6, 28) == pytest.approx([np.tanh(0.2673), np.tanh(1.1190)], abs=1e-3)
    assert correlation_interval(1.0, 3) == [-1, 1]
    low, high = correlation_interval(-1.0, 6)
    assert (low, high) == (-1, pytest.approx(-0.7, abs=0.35))


def test_an_f1_by_hand():
    # 6 hits of 10: the share is 0.3127 to 0.8318 (Wilson), and F1 = 2 s / (1 + s)
    assert f1_interval(6, 4) == pytest.approx([0.4764, 0.9082], abs=1e-4)


def test_an_auroc_covers_the_true_one_nineteen_times_in_twenty():
    rng, covered = np.random.default_rng(0), 0
    true = 0.760  # of two normals one standard deviation apart
    for _ in range(400):
        bad, good = rng.normal(0, 1, 30), rng.normal(1, 1, 20)
        auroc = (good[:, None] > bad).mean()
        low, high = auroc_interval(auroc, 20, 30)
        covered += low <= true <= high
    assert 0.92 <= covered / 400 <= 0.98


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 40))
def test_intervals_hold_the_value_and_have_a_width(part, more, others):
    rows = part + more
    for value, (low, high) in (
        (part / rows, wilson_interval(part / rows, rows)),
        (2 * part / (2 * part + more), f1_interval(part, more)),
        (part / rows, auroc_interval(part / rows, more, others)),
    ):
        assert 0 <= low <= value + 1e-12
        assert value - 1e-12 <= high <= 1
        assert high - low > 0.01
    low, high = correlation_interval(2 * part / rows - 1, rows + 3)
    assert -1 <= low <= 2 * part / rows - 1 <= high <= 1
    assert high - low > 0.01


def test_every_ratio_of_a_reward_model_has_its_interval():
    pairs = pair_metrics([3, 2, 1, 4], [0, 3, 0, 1], ([1, 2, 3, 4], [4, 3, 2, 1]))
    labels = label_metrics([[0, 1], [1, 0], [0, 2], [3, 0]], [1, 0, 0, 1], ["no", "yes"], 1)
    rankings = ranking_metrics([[3, 1, 2]] * 5, [[1, 2, 3]] * 5)
    ratings = rating_metrics([1, 2, 3, 4, 6], [1, 2, 3, 5, 4])
    for metrics in (pairs, labels, rankings, ratings):
        names = metrics.keys() - {"pairs", "rows", "rankings", "margin", "calibration_error", "confusion"}
        values = {name for name in names if not name.endswith("_interval")} - {"rmse"}
        assert names - values - {"rmse"} == {f"{name}_interval" for name in values}
        for name in values:
            low, high = metrics[f"{name}_interval"]
            assert low - 1e-12 <= metrics[name] <= high + 1e-12
            assert low < high
