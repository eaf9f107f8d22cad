"""Metrics of a reward model, computed from its scores alone.

A tie counts half, as a coin flip would. `NAME_interval` is the 95 % interval of the metric NAME over prompts,
see `pipeline.reward.intervals`: `groups` numbers the prompt of each row, and without it each row has its own.
`prompts` is their number, if it is not that of the rows. A metric that is undefined, such as the correlation
with a constant, is omitted, and so is an interval of which the rows say nothing; without rows there are no
metrics. Training shows no intervals: `intervals=False` leaves them out.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score, root_mean_squared_error

from pipeline.reward import weighted
from pipeline.reward.intervals import Groups, Numbers, Statistic, bootstrap_interval


def wins(chosen: Numbers, rejected: Numbers) -> np.ndarray:
    """Return (N,): 1 if the chosen response scores higher, ½ at a tie, else 0."""
    return np.array([(c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)])


def pair_accuracy(chosen: Numbers, rejected: Numbers) -> float:
    """Return the fraction of pairs whose chosen response scores higher."""
    return fmean(wins(chosen, rejected))


def calibration(chosen: Numbers, rejected: Numbers, bins: int = 10) -> list[dict[str, float]]:
    """Return how often the preferred side won, by the model's confidence σ(|margin|).

    The bins divide [½, 1] equally; empty bins are omitted.
    """
    won, confidence = wins(chosen, rejected), 1 / (1 + np.exp(-np.abs(np.subtract(chosen, rejected))))
    bin_indices = np.array([min(int((c - 0.5) * 2 * bins), bins - 1) for c in confidence])
    return [
        {"confidence": fmean(confidence[rows]), "accuracy": fmean(won[rows]), "count": int(rows.sum())}
        for rows in (bin_indices == index for index in np.unique(bin_indices))
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Return the expected calibration error of `calibration`'s bins.

    It is their mean |confidence − accuracy|, weighted by count.
    """
    return fmean((abs(b["confidence"] - b["accuracy"]) for b in bins), [b["count"] for b in bins])


def correlation(statistic: Callable[..., Any], x: Numbers, y: Numbers) -> float | None:
    """Return `statistic` (spearmanr or kendalltau) of two sequences, or None if either is constant."""
    return float(statistic(x, y).statistic) if min(len(np.unique(x)), len(np.unique(y))) > 1 else None


def measure_mean(
    name: str,
    values: Numbers,
    groups: Groups = None,
    low: float | None = 0.0,
    high: float | None = 1.0,
    intervals: bool = True,
) -> dict[str, Any]:
    """Return the mean over rows as `name`, such as a share, and its interval.

    The values are between `low` and `high`; None is no limit. No values have no metrics.
    """
    mean = fmean(values) if len(values) else None
    return _estimate(name, mean, weighted.mean, [values], groups, intervals, low=low, high=high)


def count_prompts(rows: int, groups: Groups) -> dict[str, int]:
    """Return the number of `prompts`, or nothing if it is that of the rows."""
    prompts = len(np.unique(_number_rows(rows, groups)))
    return {"prompts": prompts} if prompts != rows else {}


def pair_metrics(
    chosen: Numbers,
    rejected: Numbers,
    lengths: Sequence[Numbers],
    sources: Sequence[str | None] | None = None,
    groups: Groups = None,
) -> dict[str, Any]:
    """Compute accuracy, that of "the longer response wins", margin, calibration and correlation with length.

    `lengths` are the characters of the chosen responses and those of the rejected. If two or more sources are
    named, `by_source` has the accuracies of each. The calibration error has no interval: a resample repeats
    rows, which raises it.
    """
    won, longer_won, numbers = wins(chosen, rejected), wins(*lengths), _number_rows(len(chosen), groups)
    if not len(won):
        return {}

    names = sorted({source for source in sources or () if source is not None})
    rows = {name: np.array([source == name for source in sources or ()]) for name in names}
    by_source = None
    if len(names) > 1:
        by_source = {
            name: _accuracies(won[rows[name]], longer_won[rows[name]], numbers[rows[name]]) for name in names
        }

    scores, characters = np.concatenate([chosen, rejected]), np.concatenate(lengths)
    return {
        **_accuracies(won, longer_won, numbers),
        **measure_mean("margin", np.subtract(chosen, rejected), numbers, None, None),
        "calibration_error": calibration_error(calibration(chosen, rejected)),
        **_spearman("reward_length_correlation", scores, characters, np.tile(numbers, 2)),
        **_defined(by_source=by_source),
    }


def rating_metrics(
    scores: Numbers, ratings: Numbers, groups: Groups = None, intervals: bool = True
) -> dict[str, Any]:
    """Compute how close the scores are to human ratings, in value and in order."""
    if not len(scores):
        return {}
    rmse, errors = float(root_mean_squared_error(ratings, scores)), np.subtract(scores, ratings)
    return {
        "rows": len(scores),
        **count_prompts(len(scores), groups),
        **_estimate("rmse", rmse, weighted.rmse, [errors], groups, intervals, low=0.0),
        **_spearman("spearman", scores, ratings, groups, intervals),
    }


def label_metrics(
    logits: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    positive: int,
    groups: Groups = None,
    intervals: bool = True,
) -> dict[str, Any]:
    """Compute the metrics of logits (N, C) for labels (N,), which are indices into the C `classes`.

    AUROC and F1 are those of `positive` against the rest. AUROC ranks by log-odds, since a softmax determines
    the logits of a row only up to a constant. `confusion` is {true: {predicted: count}}.
    """
    logits, labels = np.asarray(logits, dtype=float), np.asarray(labels)
    if not len(labels):
        return {}

    predicted = logits.argmax(1)
    log_odds = logits[:, positive] - np.logaddexp.reduce(np.delete(logits, positive, axis=1), axis=1)
    confusion = confusion_matrix(labels, predicted, labels=range(len(classes))).tolist()
    counts = {
        name: dict(zip(classes, row, strict=True)) for name, row in zip(classes, confusion, strict=True)
    }
    return {
        "rows": len(labels),
        **count_prompts(len(labels), groups),
        **measure_mean("accuracy", predicted == labels, groups, intervals=intervals),
        **_binary_metrics(labels == positive, predicted == positive, log_odds, groups, intervals),
        "confusion": counts,
    }


def ranking_metrics(
    scores: Sequence[Numbers], ranks: Sequence[Numbers], groups: Groups = None, intervals: bool = True
) -> dict[str, Any]:
    """Compute how each prompt's scores agree with its ranks (1 is best, ties allowed): means over rankings.

    `top_1` is the share of the highest-scored responses that have the best rank. `accuracy` is the share of
    the strictly ordered pairs that are won.
    """
    rankings = [(np.asarray(s), np.asarray(r)) for s, r in zip(scores, ranks, strict=True)]
    if not rankings:
        return {}
    taus = [correlation(kendalltau, s, -r) for s, r in rankings]
    top = [fmean(r[s == s.max()] == r.min()) for s, r in rankings]
    pairs = [(s, *np.nonzero(r[:, None] < r)) for s, r in rankings]
    won = [pair_accuracy(s[better], s[worse]) if len(better) else None for s, better, worse in pairs]
    numbers = _number_rows(len(rankings), groups)

    def mean_of_defined(name: str, values: Sequence[float | None], low: float = 0.0) -> dict[str, Any]:
        defined = [row for row, value in enumerate(values) if value is not None]
        kept = [value for value in values if value is not None]
        return measure_mean(name, kept, numbers[defined], low, intervals=intervals)

    return {
        "rankings": len(rankings),
        **count_prompts(len(rankings), groups),
        **mean_of_defined("kendall_tau", taus, -1.0),
        **mean_of_defined("top_1", top),
        **mean_of_defined("accuracy", won),
    }


def _binary_metrics(
    truths: np.ndarray, calls: np.ndarray, scores: Numbers, groups: Groups, intervals: bool
) -> dict[str, Any]:
    """Return AUROC and F1 of the rows that are positive (a mask), were called so (a mask), and their scores.

    AUROC rests on the rarer class, F1 on the rows that are positive or were called so.
    """
    numbers = _number_rows(len(truths), groups)
    positives, negatives, either = (
        len(np.unique(numbers[rows])) for rows in (truths, ~truths, truths | calls)
    )
    fewest = min(positives, negatives)
    auroc = float(roc_auc_score(truths, scores)) if fewest else None
    f1 = float(f1_score(truths, calls)) if either else None
    share: dict[str, Any] = {"groups": numbers, "intervals": intervals, "low": 0.0, "high": 1.0}
    return {
        **_estimate("auroc", auroc, weighted.auroc, [truths, scores], informative=fewest, **share),
        **_estimate("f1", f1, weighted.f1, [truths, calls], informative=either, **share),
    }


def _accuracies(won: np.ndarray, longer_won: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    return {
        "pairs": len(won),
        **count_prompts(len(won), groups),
        **measure_mean("accuracy", won, groups),
        **measure_mean("accuracy_longer", longer_won, groups),
    }


def _spearman(name: str, x: Numbers, y: Numbers, groups: Groups, intervals: bool = True) -> dict[str, Any]:
    value = correlation(spearmanr, x, y)
    return _estimate(name, value, weighted.spearman, [x, y], groups, intervals, low=-1.0, high=1.0)


def _estimate(
    name: str,
    value: float | None,
    statistic: Statistic,
    columns: Sequence[Numbers],
    groups: Groups,
    intervals: bool,
    **limits: Any,
) -> dict[str, Any]:
    """Return the value as `name`, and its interval; nothing if it is None, which is undefined."""
    if value is None:
        return {}
    bounds = bootstrap_interval(statistic, columns, groups, **limits) if intervals else None
    return {name: value} | _defined(**{f"{name}_interval": bounds})


def _number_rows(rows: int, groups: Groups) -> np.ndarray:
    """Return the groups as an array; without them each row is one."""
    return np.arange(rows) if groups is None else np.asarray(groups)


def _defined(**metrics: Any) -> dict[str, Any]:
    """Return the metrics without those that are None."""
    return {name: value for name, value in metrics.items() if value is not None}
