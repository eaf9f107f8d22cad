"""Metrics of a stepwise reward model: how well it tells wrong steps from right ones.

A step counts as wrong if the probability that it is right is below one half. Intervals resample prompts.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score

from pipeline.reward import weighted
from pipeline.reward.intervals import Numbers, bootstrap_interval
from pipeline.reward.settings import AGGREGATES

THRESHOLD = 0.5  # of the probability below which a step counts as wrong


def step_metrics(
    scores: Sequence[Numbers], labels: Sequence[Numbers], groups: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compute the metrics of the scores of steps, the probabilities that they are right.

    There is one list of scores and one of labels per response, 1 for a right step and 0 for a wrong one.

    - `auroc`: how often a right step scores higher than a wrong one, over all pairs of steps.
    - `f1_wrong`: F1 of finding the wrong steps.
    - `first_error`: of the responses with an error, the share whose first wrong step was found: it is the
      first one that scores below one half. `all_right`: of the right responses, the share in which no step
      was called wrong. `first_error_f1`: the harmonic mean of the two. These are the measures of
      ProcessBench, Zheng et al. 2024 (arXiv 2412.06559).
    - `best_of_n`: see `best_of_n`.

    `rows` is the number of responses. Without `groups`, the number of each response's prompt, there are no
    intervals and no `best_of_n`.
    """
    if not len(scores):
        return {}
    flat, truth = np.concatenate(scores), np.concatenate(labels)
    steps_of = np.repeat(np.arange(len(scores)), [len(row) for row in scores])
    numbers = None if groups is None else np.asarray(groups)
    step_groups = None if numbers is None else numbers[steps_of]
    metrics: dict[str, Any] = {"rows": len(scores), "steps": len(flat)}

    wrong, called = (truth == 0).astype(float), (flat < THRESHOLD).astype(float)
    if 0 < wrong.sum() < len(wrong):
        metrics["auroc"] = float(roc_auc_score(truth, flat))
        metrics |= _interval("auroc", weighted.auroc, [1 - wrong, flat], step_groups, 1 - wrong, wrong)
    if wrong.any() or called.any():
        metrics["f1_wrong"] = float(f1_score(wrong, called))
        metrics |= _interval("f1_wrong", weighted.f1, [wrong, called], step_groups, np.maximum(wrong, called))
    metrics |= _process_bench(scores, labels, numbers)
    if numbers is not None:
        metrics["best_of_n"] = best_of_n(scores, labels, numbers)
    return metrics


def first_wrong(row: Numbers) -> int | None:
    """Return the index of the first number below one half, or None: of the first wrong step."""
    return next((i for i, value in enumerate(row) if value < THRESHOLD), None)


def best_of_n(
    scores: Sequence[Numbers], labels: Sequence[Numbers], groups: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Return for each aggregate how often the best of a prompt's responses is right in every step.

    Only prompts count that have such responses and others. `accuracy` is the share of prompts, and of several
    best responses the share that is right; `chance` is that of a response drawn at random.
    """
    right = np.array([min(row) for row in labels]) == 1
    chosen = [
        rows for g in np.unique(groups) if 0 < right[rows := np.flatnonzero(groups == g)].sum() < len(rows)
    ]
    if not chosen:
        return {}
    chance = fmean(fmean(right[rows]) for rows in chosen)
    results = {}
    for name, aggregate in AGGREGATES.items():
        totals = np.array([aggregate(row) for row in scores])
        wins = [fmean(right[rows][totals[rows] == totals[rows].max()]) for rows in chosen]
        interval = _interval("accuracy", weighted.mean, [wins], np.arange(len(wins)))
        results[name] = {"prompts": len(wins), "accuracy": fmean(wins), **interval, "chance": chance}
    return results


def _process_bench(
    scores: Sequence[Numbers], labels: Sequence[Numbers], groups: np.ndarray | None
) -> dict[str, Any]:
    matches = np.array(
        [first_wrong(s) == first_wrong(t) for s, t in zip(scores, labels, strict=True)], dtype=float
    )
    has_error = np.array([first_wrong(row) is not None for row in labels])
    metrics: dict[str, Any] = {}
    for name, rows in (("first_error", has_error), ("all_right", ~has_error)):
        if rows.any():
            own = None if groups is None else groups[rows]
            metrics[name] = fmean(matches[rows])
            metrics |= _interval(name, weighted.mean, [matches[rows]], own)
    if len(metrics) and has_error.any() and not has_error.all():
        columns = [matches, has_error.astype(float)]
        metrics["first_error_f1"] = float(_harmonic_mean(np.ones((1, len(matches))), *columns)[0])
        metrics |= _interval("first_error_f1", _harmonic_mean, columns, groups, has_error, ~has_error)
    return metrics


def _harmonic_mean(weights: np.ndarray, matches: np.ndarray, has_error: np.ndarray) -> np.ndarray:
    """Return the harmonic means of the two shares of `matches`, for each weighting of the responses."""
    one = weighted.ratio(weights, matches * has_error, has_error)
    other = weighted.ratio(weights, matches * (1 - has_error), 1 - has_error)
    total = one + other
    return np.where(total > 0, 2 * one * other / np.where(total > 0, total, 1.0), total)


def _interval(
    name: str, statistic: Any, columns: list[Any], groups: np.ndarray | None, *classes: np.ndarray
) -> dict[str, Any]:
    """Return the interval of a share; it rests on as many prompts as have a row of the rarer of `classes`."""
    if groups is None:
        return {}
    fewest = min((len(np.unique(groups[rows.astype(bool)])) for rows in classes), default=None)
    return {f"{name}_interval": bootstrap_interval(statistic, columns, groups, 0.0, 1.0, fewest)}
