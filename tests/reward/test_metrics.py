"""Metrics of scores, by hand."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.reward import weighted
from pipeline.reward.intervals import bootstrap_interval, wilson_interval
from pipeline.reward.metrics import (
    calibration,
    calibration_error,
    label_metrics,
    pair_accuracy,
    pair_metrics,
    ranking_metrics,
    rating_metrics,
    wins,
)

SCORES = st.integers(-3, 3)
PAIRS = st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=20).map(
    lambda rows: tuple(map(list, zip(*rows, strict=True)))
)
RANKED = st.lists(st.tuples(SCORES, st.integers(1, 4)), min_size=1, max_size=6)
RANKINGS = st.lists(RANKED, min_size=1, max_size=5).map(
    lambda prompts: ([[s for s, _ in rows] for rows in prompts], [[r for _, r in rows] for rows in prompts])
)


def is_plain(value: Any) -> bool:
    """Python's own types all the way down, and no NaN: numpy's float64 passes for a float in `json`."""
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(x) for key, x in value.items())
    return (
        all(map(is_plain, value))
        if type(value) is list
        else type(value) in (int, float) and math.isfinite(value)
    )


def without(metrics: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the metrics without the intervals of some of them, which have tests of their own."""
    return {key: value for key, value in metrics.items() if key not in [f"{name}_interval" for name in names]}


# Pairs


@pytest.mark.parametrize(
    ("chosen", "rejected", "accuracy"),
    [
        ([1, 2], [0, 1], 1.0),
        ([0, 0], [1, 1], 0.0),
        ([1, 1], [1, 1], 0.5),
        ([2, 1, 0, -1], [1, 1, 1, -2], 0.625),
    ],
)
def test_a_tie_counts_half(chosen: list[float], rejected: list[float], accuracy: float) -> None:
    assert pair_accuracy(chosen, rejected) == accuracy


def test_wins_are_by_row() -> None:
    assert wins([2, 1, 0], [1, 1, 1]).tolist() == [1.0, 0.5, 0.0]
    assert wins([], []).shape == (0,)


def test_accuracy_is_over_rows_of_equal_number() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pair_accuracy([1.0, 2.0], [0.0])


@given(PAIRS, st.integers(-100, 100))
def test_accuracy_knows_order_alone(pairs: tuple[list[int], list[int]], constant: int) -> None:
    chosen, rejected = pairs
    accuracy = pair_accuracy(chosen, rejected)
    assert pair_accuracy([c + constant for c in chosen], [r + constant for r in rejected]) == accuracy
    assert pair_accuracy([-c for c in chosen], [-r for r in rejected]) == pytest.approx(1 - accuracy)


# σ(|margin|) is 0.5, 0.6, 0.8, 0.8 and 1; the second and the fourth preferred side lost.
MARGINS = [0.0, -math.log(1.5), math.log(4), -math.log(4), 1e4]


@pytest.mark.parametrize(
    ("bins", "expected"),
    [
        (1, [(0.74, 0.5, 5)]),
        (2, [(0.55, 0.25, 2), (2.6 / 3, 2 / 3, 3)]),
        (4, [(0.55, 0.25, 2), (0.8, 0.5, 2), (1.0, 1.0, 1)]),
    ],
)
def test_calibration_bins(bins: int, expected: list[tuple[float, float, int]]) -> None:
    found = calibration([m + 3 for m in MARGINS], [3.0] * len(MARGINS), bins)
    assert [tuple(row.values()) for row in found] == [pytest.approx(row, rel=1e-9) for row in expected]
    assert list(found[0]) == ["confidence", "accuracy", "count"]
    assert is_plain(found)
    assert calibration([], [], bins) == []


def test_calibration_refuses_a_score_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="NaN"):
        calibration([math.nan, 1.0], [0.0, 0.0])


def test_calibration_error_is_weighted_and_its_signs_do_not_cancel() -> None:
    bins = [
        {"confidence": 0.6, "accuracy": 0.9, "count": 1},
        {"confidence": 0.9, "accuracy": 0.7, "count": 3},
    ]
    assert calibration_error(bins) == pytest.approx((0.3 + 3 * 0.2) / 4)
    assert calibration_error(calibration([m + 3 for m in MARGINS], [3.0] * len(MARGINS), 4)) == pytest.approx(
        (2 * 0.3 + 2 * 0.3 + 0) / 5
    )


CHOSEN, REJECTED = [8, 6, 4, 1], [7, 5, 3, 2]
LENGTHS = ([70, 80, 30, 10], [60, 50, 40, 20])


def test_pair_metrics_by_hand() -> None:
    found = without(
        pair_metrics(CHOSEN, REJECTED, LENGTHS),
        "accuracy",
        "accuracy_longer",
        "margin",
        "reward_length_correlation",
    )
    expected = {
        "pairs": 4,
        "accuracy": 0.75,
        "accuracy_longer": 0.5,
        "margin": 0.5,
        "calibration_error": 0.75 - 1 / (1 + math.exp(-1)),
        "reward_length_correlation": 1 - 6 * (1 + 4 + 1 + 0 + 1 + 0 + 1 + 0) / (8 * 63),
    }
    assert list(found) == list(expected)
    assert all(found[name] == pytest.approx(value) for name, value in expected.items())
    assert is_plain(found)


def test_pair_metrics_by_source() -> None:
    found = pair_metrics(CHOSEN, REJECTED, LENGTHS, ["b", "a", "b", None])
    assert list(found)[-1] == "by_source"
    sources = found["by_source"]
    assert {name: without(rows, "accuracy_longer") for name, rows in sources.items()} == {
        "a": {
            "pairs": 1,
            "accuracy": 1.0,
            "accuracy_interval": wilson_interval(1, 1),
            "accuracy_longer": 1.0,
        },
        "b": {
            "pairs": 2,
            "accuracy": 1.0,
            "accuracy_interval": wilson_interval(1, 2),
            "accuracy_longer": 0.5,
        },
    }
    assert is_plain(found)
    assert list(
        pair_metrics(range(8), range(8), (range(8), range(8)), list("hgfedcba"))["by_source"]
    ) == list("abcdefgh")


@pytest.mark.parametrize("sources", [["a"] * 4, ["a", None, "a", None], [None] * 4, []])
def test_one_source_is_all_of_them(sources: list[str | None]) -> None:
    assert pair_metrics(CHOSEN, REJECTED, LENGTHS, sources) == pair_metrics(CHOSEN, REJECTED, LENGTHS)


def test_pair_metrics_of_ties_and_of_nothing() -> None:
    tied = {
        "pairs": 2,
        "accuracy": 0.5,
        "accuracy_interval": wilson_interval(0.5, 2),
        "accuracy_longer": 0.5,
        "accuracy_longer_interval": wilson_interval(0.5, 2),
    }
    assert pair_metrics([1, 1], [1, 1], ([3, 4], [3, 4])) == tied | {"margin": 0.0, "calibration_error": 0.0}
    assert "reward_length_correlation" not in pair_metrics([1, 2], [0, 0], ([3, 3], [3, 3]))
    assert pair_metrics([1], [0], ([2], [1]))["reward_length_correlation"] == pytest.approx(1.0)
    assert pair_metrics([], [], ([], [])) == {}


# Prompts

SIX_ROWS = [5, 5, 5, 5, 9, 9]  # the prompts of six rows


def test_prompts_are_counted_and_resampled() -> None:
    """The prompts, not the rows, decide an interval: it is that of the metrics of one row per prompt."""
    scores, lengths = [1, 1, 1, 1, 0, 0], ([2] * 6, [1] * 6)
    found = pair_metrics(scores, [0.5] * 6, lengths, ["a", "b"] * 3, SIX_ROWS)
    assert (found["pairs"], found["prompts"], found["accuracy"]) == (6, 2, 4 / 6)
    assert found["accuracy_longer_interval"] == wilson_interval(1.0, 2)
    assert found["accuracy_interval"] == bootstrap_interval(weighted.ratio, [[4, 0], [4, 2]], None, 0.0, 1.0)
    assert [source["prompts"] for source in found["by_source"].values()] == [2, 2]
    assert "prompts" not in pair_metrics(scores, [0.5] * 6, lengths, groups=range(6))

    ratings = rating_metrics(scores, [1] * 6, SIX_ROWS)
    assert (ratings["rows"], ratings["prompts"]) == (6, 2)
    labels = label_metrics(np.stack([np.zeros(6), scores], 1), [1] * 6, ["no", "yes"], 1, SIX_ROWS)
    assert (labels["prompts"], labels["accuracy_interval"]) == (2, found["accuracy_interval"])
    rankings = ranking_metrics([[2, 1]] * 5 + [[1, 1]], [[1, 2]] * 6, SIX_ROWS)
    assert (rankings["rankings"], rankings["prompts"]) == (6, 2)
    assert rankings["kendall_tau_interval"] == [2 * wilson_interval(1.0, 2)[0] - 1, 1.0]


def test_training_has_no_intervals() -> None:
    for metrics in (
        rating_metrics([1, 2, 4], [1, 3, 2], intervals=False),
        label_metrics([[0, 1], [1, 0], [0, 2]], [1, 0, 0], ["no", "yes"], 1, intervals=False),
        ranking_metrics([[3, 1]] * 3, [[1, 2]] * 3, intervals=False),
    ):
        assert len(metrics) >= 3
        assert not [name for name in metrics if "interval" in name]


# Ratings


def test_rating_metrics_by_hand() -> None:
    found = without(rating_metrics([1, 2, 4], [1, 3, 2]), "spearman", "rmse")
    assert found == pytest.approx({"rows": 3, "rmse": math.sqrt(5 / 3), "spearman": 1 - 6 * 2 / (3 * 8)})
    assert list(found) == ["rows", "rmse", "spearman"]
    assert is_plain(found)


@pytest.mark.parametrize(
    ("scores", "ratings", "expected"),
    [
        ([2, 2], [1, 3], {"rows": 2, "rmse": 1.0}),
        ([1, 3], [2, 2], {"rows": 2, "rmse": 1.0}),
        ([5], [2], {"rows": 1, "rmse": 3.0}),
        ([], [], {}),
    ],
)
def test_rating_metrics_without_an_order(
    scores: list[float], ratings: list[float], expected: dict[str, float]
) -> None:
    assert rating_metrics(scores, ratings) == expected


# Labels

CLASSES = ["no", "yes", "unsure"]
# The odds of "yes" are 4, 20/45, 1/3, 1/5 and 1: the two that are "yes" win 3 + 1 of 6 comparisons. By the
# lone logit they would win 2½,
# by its distance to the next best 5.
WEIGHTS = [[1, 8, 1], [44, 20, 1], [2, 1, 1], [1, 1, 4], [1, 3, 2]]
LABELS = [1, 0, 1, 2, 0]


def test_label_metrics_by_hand() -> None:
    found = without(
        label_metrics(np.log(WEIGHTS).tolist(), LABELS, CLASSES, positive=1), "accuracy", "auroc", "f1"
    )
    expected = {
        "rows": 5,
        "accuracy": 0.6,
        "auroc": 4 / 6,
        "f1": 2 * 1 / (2 * 1 + 1 + 1),
    }
    confusion = {
        "no": {"no": 1, "yes": 1, "unsure": 0},
        "yes": {"no": 1, "yes": 1, "unsure": 0},
        "unsure": {"no": 0, "yes": 0, "unsure": 1},
    }
    assert list(found) == [*expected, "confusion"]
    assert found["confusion"] == confusion
    assert all(found[name] == pytest.approx(value) for name, value in expected.items())
    assert is_plain(found)


def test_label_metrics_of_another_positive_class() -> None:
    found = label_metrics(
        np.log(WEIGHTS), LABELS, CLASSES, positive=2
    )  # odds 1/9, 1/64, 1/3, 2 (the only "unsure") and 1/2
    assert (found["accuracy"], found["auroc"], found["f1"]) == (0.6, 1.0, 1.0)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_a_constant_in_a_row_of_logits_says_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits, labels = random.normal(size=(12, 3)), [0, 1, 2] * 4
    found = label_metrics(logits, labels, CLASSES, 1)
    assert label_metrics(logits + random.normal(0, 50, (12, 1)), labels, CLASSES, 1) == found
    reverse = label_metrics(logits[:, ::-1], [2 - label for label in labels], CLASSES[::-1], 1)
    assert (reverse["auroc"], reverse["confusion"]) == (pytest.approx(found["auroc"]), found["confusion"])


@pytest.mark.parametrize(("label", "f1"), [(1, 2 / 3), (0, 0.0)])
def test_one_class_has_no_auroc(label: int, f1: float) -> None:
    found = label_metrics([[0, 1], [1, 0]], [label] * 2, ["no", "yes"], 1)
    assert list(found) == ["rows", "accuracy", "accuracy_interval", "f1", "f1_interval", "confusion"]
    assert found["f1"] == pytest.approx(f1)
    assert found["confusion"] == {
        name: dict.fromkeys(["no", "yes"], int(i == label)) for i, name in enumerate(["no", "yes"])
    }


def test_labels_without_a_positive_and_without_a_row() -> None:
    assert label_metrics([[1, 0]], [0], ["no", "yes"], 1) == {
        "rows": 1,
        "accuracy": 1.0,
        "accuracy_interval": wilson_interval(1, 1),
        "confusion": {"no": {"no": 1, "yes": 0}, "yes": {"no": 0, "yes": 0}},
    }
    assert label_metrics([], [], ["no", "yes"], 1) == {}


# Rankings


def test_ranking_metrics_by_hand() -> None:
    scores = [[3, 2, 1], [1, 1, 0], [5, 5], [1, 2]]
    ranks = [[1, 2, 3], [2, 1, 1], [1, 2], [1, 1]]
    found = without(ranking_metrics(scores, ranks), "kendall_tau", "top_1")
    expected = {
        "rankings": 4,
        "kendall_tau": (1 - 1 / math.sqrt(2 * 2)) / 2,  # the last two are constant
        "top_1": (1 + 0.5 + 0.5 + 1) / 4,
        "accuracy": (1 + 0.5 / 2 + 0.5) / 3,  # the last has no order
        "accuracy_interval": bootstrap_interval(weighted.mean, [[1, 0.25, 0.5]], None, 0.0, 1.0),
    }
    assert list(found) == list(expected)
    assert all(found[name] == pytest.approx(value) for name, value in expected.items())
    assert is_plain(found)


@pytest.mark.parametrize(
    ("scores", "ranks", "expected"),
    [
        (
            [1, 2, 3],
            [1, 2, 3],
            {
                "rankings": 1,
                "kendall_tau": -1.0,
                "top_1": 0.0,
                "accuracy": 0.0,
                "accuracy_interval": wilson_interval(0, 1),
            },
        ),
        (
            [4, 1, 2, 3],
            [1, 2, 3, 4],
            {
                "rankings": 1,
                "kendall_tau": 0.0,
                "top_1": 1.0,
                "accuracy": 0.5,
                "accuracy_interval": wilson_interval(0.5, 1),
            },
        ),
        (
            [0, 0, 0, 0],
            [1, 2, 3, 3],
            {"rankings": 1, "top_1": 0.25, "accuracy": 0.5, "accuracy_interval": wilson_interval(0.5, 1)},
        ),
        ([1, 2, 3], [2, 2, 2], {"rankings": 1, "top_1": 1.0}),
        ([7], [1], {"rankings": 1, "top_1": 1.0}),
    ],
)
def test_ranking_metrics_of_one_prompt(
    scores: list[float], ranks: list[int], expected: dict[str, Any]
) -> None:
    assert without(ranking_metrics([scores], [ranks]), "kendall_tau", "top_1") == expected


def test_no_rankings_have_no_metrics_and_each_has_its_ranks() -> None:
    assert ranking_metrics([], []) == {}
    with pytest.raises(ValueError, match="shorter"):
        ranking_metrics([[1.0, 2.0]], [])


@settings(max_examples=25)
@given(RANKINGS, st.integers(-100, 100))
def test_rankings_know_order_alone(rankings: tuple[list[list[int]], list[list[int]]], constant: int) -> None:
    scores, ranks = rankings
    found = ranking_metrics(scores, ranks)
    assert ranking_metrics([[s + constant for s in row] for row in scores], ranks) == found
    negated = ranking_metrics([[-s for s in row] for row in scores], ranks)
    assert set(negated) == set(found)
    assert negated.get("kendall_tau", 0) == pytest.approx(-found.get("kendall_tau", 0))
    assert negated.get("accuracy", 0.5) == pytest.approx(1 - found.get("accuracy", 0.5))


@settings(max_examples=25)
@given(PAIRS)
def test_a_pair_is_a_ranking_of_two(pairs: tuple[list[int], list[int]]) -> None:
    found = ranking_metrics([list(pair) for pair in zip(*pairs, strict=True)], [[1, 2]] * len(pairs[0]))
    assert found["accuracy"] == found["top_1"] == pytest.approx(pair_accuracy(*pairs))
