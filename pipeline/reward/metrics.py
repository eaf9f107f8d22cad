"""Metrics of a reward model, computed from its scores alone.

A tie counts half, as a coin flip would. Intervals are 95 %, by the bootstrap over rows. A metric that is
undefined, such as the correlation with a constant, is omitted; without rows there are no metrics.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score, root_mean_squared_error

Numbers = Sequence[float] | np.ndarray


def wins(chosen: Numbers, rejected: Numbers) -> np.ndarray:
    """Return (N,): 1 if the chosen response scores higher, ½ at a tie, else 0."""
    return np.array([(c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)])


def pair_accuracy(chosen: Numbers, rejected: Numbers) -> float:
    """Return the fraction of pairs whose chosen response scores higher."""
    return fmean(wins(chosen, rejected))


def interval(values: Numbers, seed: int = 0, resamples: int = 1000) -> list[float]:
    """Return [low, high] of the mean: the 95 % percentile bootstrap over rows.

    Raises `ValueError` if there are no values.
    """
    if not len(values):
        raise ValueError("an empty sequence has no mean")
    rng, values = np.random.default_rng(seed), np.asarray(values)
    # One resample at a time: all together would need resamples × N of memory.
    means = [rng.choice(values, len(values)).mean() for _ in range(resamples)]
    return np.quantile(means, [0.025, 0.975]).tolist()


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

    return _accuracies(won, longer_won) | _defined(
        accuracy_longer_interval=interval(longer_won),
        margin=fmean(np.subtract(chosen, rejected)),
        calibration_error=calibration_error(calibration(chosen, rejected)),
        reward_length_correlation=correlation(
            spearmanr, np.concatenate([chosen, rejected]), np.concatenate(lengths)
        ),
        by_source=by_source,
    )


def rating_metrics(scores: Numbers, ratings: Numbers) -> dict[str, Any]:
    """Compute how close the scores are to human ratings, in value and in order."""
    if not len(scores):
        return {}
    rmse = float(root_mean_squared_error(ratings, scores))
    return {"rows": len(scores), "rmse": rmse, **_defined(spearman=correlation(spearmanr, scores, ratings))}


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
    defined = _defined(
        auroc=float(roc_auc_score(is_positive, log_odds))
        if 0 < is_positive.sum() < len(is_positive)
        else None,
        f1=float(f1_score(is_positive, called_positive)) if (is_positive | called_positive).any() else None,
    )

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
    defined = _defined(kendall_tau=fmean(taus) if taus else None, top_1=fmean(top))
    return {"rankings": len(prompts), **defined, **(_accuracy(won) if won else {})}


def _accuracy(values: Numbers) -> dict[str, Any]:
    return {"accuracy": fmean(values), "accuracy_interval": interval(values)}


def _accuracies(won: np.ndarray, longer_won: np.ndarray) -> dict[str, Any]:
    return {"pairs": len(won), **_accuracy(won), "accuracy_longer": fmean(longer_won)}


def _defined(**metrics: Any) -> dict[str, Any]:
    """Return the metrics without those that are None."""
    return {name: value for name, value in metrics.items() if value is not None}
