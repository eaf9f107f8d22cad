"""Metrics on pairs, by hand."""

import math

import pytest
from datasets import Dataset, DatasetDict

from pipeline.reward.metrics import calibration, held_out, pair_accuracy, pair_metrics


@pytest.mark.parametrize(
    ("chosen", "rejected", "accuracy"),
    [([1, 2], [0, 1], 1.0), ([0, 0], [1, 1], 0.0), ([1, 1], [1, 1], 0.5), ([2, 1, 0, -1], [1, 1, 1, -2], 0.625)],
)
def test_a_tie_counts_half(chosen: list[float], rejected: list[float], accuracy: float) -> None:
    assert pair_accuracy(chosen, rejected) == accuracy


def test_accuracy_is_over_rows_of_equal_number() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pair_accuracy([1.0, 2.0], [0.0])


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
    assert calibration([], [], bins) == []


def test_pair_metrics_beside_longer_wins_and_the_split_they_are_taken_on() -> None:
    answer = [[{"role": "assistant", "content": "long answer"}]]
    pairs = Dataset.from_dict({"prompt": ["p"] * 2, "chosen": ["long answer", "a"], "rejected": ["a", "b"]})
    assert pair_metrics([1.0, 0.0], [0.0, 1.0], pairs) == {"pairs": 2, "accuracy": 0.5, "accuracy_longer": 0.75}
    messages = Dataset.from_dict({"prompt": ["p"], "chosen": answer, "rejected": [[{"role": "assistant", "content": "longer by far"}]]})
    assert pair_metrics([1.0], [0.0], messages)["accuracy_longer"] == 0.0
    empty = pairs.select([])
    assert pair_metrics([], [], empty) == {}
    assert held_out(DatasetDict(test=pairs, validation=messages)) is pairs
    assert held_out(DatasetDict(test=empty, validation=messages)) is messages
