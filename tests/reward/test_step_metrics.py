"""Metrics of steps, against numbers worked by hand."""

import numpy as np
import pytest

from pipeline.reward.step_metrics import best_of_n, first_wrong, step_metrics

# Two prompts of two responses. Of each response, the scores of its steps and their labels.
SCORES = [[0.9, 0.4, 0.2], [0.8, 0.7], [0.6, 0.3], [0.9, 0.45]]
LABELS = [[1, 0, 0], [1, 1], [0, 1], [1, 1]]
PROMPTS = ["a", "a", "b", "b"]


def test_the_metrics_of_nine_steps():
    found = step_metrics(SCORES, LABELS, PROMPTS)
    assert (found["responses"], found["steps"]) == (4, 9)
    # Right: .9 .8 .7 .3 .9 .45; wrong: .4 .2 .6. Of 18 pairs, .4 wins over .3, .6 over .3 and .45.
    assert found["auroc"] == pytest.approx(15 / 18)
    # Called wrong: .4 .2 .3 .45, of which two are; one wrong step (.6) was not called.
    assert found["f1_wrong"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 1))
    # The first error of the first response was found (step 2), that of the third was not (step 1, called 2).
    assert found["first_error"] == 0.5
    assert found["all_right"] == 0.5  # the second response; the fourth has a false alarm
    assert found["process_f1"] == 0.5
    for name in ("auroc", "f1_wrong", "first_error", "all_right", "process_f1"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low <= found[name] <= high <= 1, name


def test_the_harmonic_mean_of_unequal_shares():
    found = step_metrics([[0.2], [0.9], [0.9], [0.9]], [[0], [0], [0], [1]])
    assert (found["first_error"], found["all_right"]) == (pytest.approx(1 / 3), 1.0)
    assert found["process_f1"] == pytest.approx(0.5)  # 2 · ⅓ · 1 / (⅓ + 1)
    assert not any(name.endswith("_interval") or name == "best_of_n" for name in found)


def test_half_counts_as_right():
    assert first_wrong([0.5, 0.9]) is None
    assert first_wrong([0.5, 0.49]) == 1


def test_the_best_response_by_each_aggregate():
    scores = [[0.9, 0.2], [0.5, 0.5], [0.1, 0.9], [0.6, 0.6]]
    labels = [[1, 0], [1, 1], [0, 1], [1, 1]]
    found = best_of_n(scores, labels, np.array([0, 0, 1, 1]))
    # Prompt 0: min and product choose the right one (.5 and .25 over .2 and .18), mean the wrong one
    # (.55 over .5), last the right one. Prompt 1: only last chooses the wrong one.
    expected = {"min": 1.0, "product": 1.0, "mean": 0.5, "last": 0.5}
    assert {name: result["accuracy"] for name, result in found.items()} == expected
    assert all((result["prompts"], result["chance"]) == (2, 0.5) for result in found.values())


def test_best_of_n_needs_right_and_wrong_responses_to_a_prompt():
    assert best_of_n([[0.9], [0.1]], [[1], [0]], np.array([0, 1])) == {}
    tie = best_of_n([[0.9], [0.9], [0.1]], [[1], [0], [0]], np.array([0, 0, 0]))
    assert (tie["min"]["accuracy"], tie["min"]["chance"]) == (0.5, pytest.approx(1 / 3))


def test_steps_of_one_class_have_no_auroc():
    found = step_metrics([[0.9, 0.8]], [[1, 1]], ["a"])
    assert found == {"responses": 1, "steps": 2, "all_right": 1.0, "best_of_n": {}} | {
        "all_right_interval": found["all_right_interval"]
    }
    assert step_metrics([], [], []) == {}
