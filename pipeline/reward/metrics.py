"""Metrics of a reward model, computed from its scores alone.

A tie counts half, as a coin flip would. `NAME_interval` is the 95 % interval of the metric NAME, see
`pipeline.reward.intervals`. A metric that is undefined, such as the correlation with a constant, is omitted;
without rows there are no metrics.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score, root_mean_squared_error

from pipeline.reward.intervals import (
    Numbers,
    auroc_interval,
    bounded_interval,
    correlation_interval,
    f1_interval,
)


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


def pair_metrics(
    chosen: Numbers,
    rejected: Numbers,
    lengths: Sequence[Numbers],
    sources: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Compute accuracy, that of "the longer response wins", margin, calibration and correlation with length.

    `lengths` are the characters of the chosen responses and those of the rejected. If two or more sources are
    named, `by_source` has the accuracies of each.
    """
    won, longer_won = wins(chosen, rejected), wins(*lengths)
    if not len(won):
        return {}

    names = sorted({source for source in sources or () if source is not None})
    rows = {name: np.array([source == name for source in sources or ()]) for name in names}
    by_source = None
    if len(names) > 1:
        by_source = {name: _accuracies(won[rows[name]], longer_won[rows[name]]) for name in names}

    length_correlation = correlation(spearmanr, np.concatenate([chosen, rejected]), np.concatenate(lengths))
    return _accuracies(won, longer_won) | _defined(
        accuracy_longer_interval=bounded_interval(longer_won),
        margin=fmean(np.subtract(chosen, rejected)),
        calibration_error=calibration_error(calibration(chosen, rejected)),
        reward_length_correlation=length_correlation,
        reward_length_correlation_interval=_correlation_interval(length_correlation, 2 * len(won)),
        by_source=by_source,
    )


def rating_metrics(scores: Numbers, ratings: Numbers) -> dict[str, Any]:
    """Compute how close the scores are to human ratings, in value and in order."""
    if not len(scores):
        return {}
    rmse = float(root_mean_squared_error(ratings, scores))
    spearman = correlation(spearmanr, scores, ratings)
    return {"rows": len(scores), "rmse": rmse} | _defined(
        spearman=spearman,
        spearman_interval=_correlation_interval(spearman, len(scores)),
    )


def label_metrics(
    logits: ArrayLike, labels: ArrayLike, classes: Sequence[str], positive: int
) -> dict[str, Any]:
    """Compute the metrics of logits (N, C) for labels (N,), which are indices into the C `classes`.

    AUROC and F1 are those of `positive` against the rest. AUROC ranks by log-odds, since a softmax determines
    the logits of a row only up to a constant. `confusion` is {true: {predicted: count}}.
    """
    logits, labels = np.asarray(logits, dtype=float), np.asarray(labels)
    if not len(labels):
        return {}

    predicted = logits.argmax(1)
    is_positive, called_positive = labels == positive, predicted == positive
    log_odds = logits[:, positive] - np.logaddexp.reduce(np.delete(logits, positive, axis=1), axis=1)
    defined: dict[str, Any] = {}
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    if positives and negatives:
        auroc = float(roc_auc_score(is_positive, log_odds))
        defined |= {"auroc": auroc, "auroc_interval": auroc_interval(auroc, positives, negatives)}
    if (is_positive | called_positive).any():
        hits, misses = int((is_positive & called_positive).sum()), int((is_positive ^ called_positive).sum())
        defined["f1"] = float(f1_score(is_positive, called_positive))
        defined["f1_interval"] = f1_interval(hits, misses)

    confusion = confusion_matrix(labels, predicted, labels=range(len(classes))).tolist()
    counts = {
        name: dict(zip(classes, row, strict=True)) for name, row in zip(classes, confusion, strict=True)
    }
    return {"rows": len(labels), **_accuracy(predicted == labels), **defined, "confusion": counts}


def ranking_metrics(scores: Sequence[Numbers], ranks: Sequence[Numbers]) -> dict[str, Any]:
    """Compute how each prompt's scores agree with its ranks (1 is best, ties allowed), as means over prompts.

    `top_1` is the share of the highest-scored responses that have the best rank. `accuracy` is the share of
    the strictly ordered pairs that are won.
    """
    prompts = [(np.asarray(s), np.asarray(r)) for s, r in zip(scores, ranks, strict=True)]
    if not prompts:
        return {}
    taus = [tau for s, r in prompts if (tau := correlation(kendalltau, s, -r)) is not None]
    top = [fmean(r[s == s.max()] == r.min()) for s, r in prompts]
    pairs = [(s, *np.nonzero(r[:, None] < r)) for s, r in prompts]
    won = [pair_accuracy(s[better], s[worse]) for s, better, worse in pairs if len(better)]
    defined = _defined(
        kendall_tau=fmean(taus) if taus else None,
        kendall_tau_interval=bounded_interval(taus, -1.0) if taus else None,
        top_1=fmean(top),
        top_1_interval=bounded_interval(top),
    )
    return {"rankings": len(prompts), **defined, **(_accuracy(won) if won else {})}


def _accuracy(values: Numbers) -> dict[str, Any]:
    return {"accuracy": fmean(values), "accuracy_interval": bounded_interval(values)}


def _accuracies(won: np.ndarray, longer_won: np.ndarray) -> dict[str, Any]:
    return {"pairs": len(won), **_accuracy(won), "accuracy_longer": fmean(longer_won)}


def _correlation_interval(value: float | None, rows: int) -> list[float] | None:
    return None if value is None else correlation_interval(value, rows)


def _defined(**metrics: Any) -> dict[str, Any]:
    """Return the metrics without those that are None."""
    return {name: value for name, value in metrics.items() if value is not None}
