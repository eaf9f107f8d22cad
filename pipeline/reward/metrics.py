"""What a reward model is worth, from its scores alone.

A tie counts half: it is as good as a coin. Intervals are 95 %, by the bootstrap over rows. A figure that is undefined, such as a
correlation with a constant, is left out, and no rows give no figures.
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
    """1 where the chosen answer scores higher, ½ at a tie, else 0 (N,)."""
    return np.array([(c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)])


def pair_accuracy(chosen: Numbers, rejected: Numbers) -> float:
    """The fraction of pairs whose chosen answer scores higher, over rows."""
    return fmean(wins(chosen, rejected))


def interval(values: Numbers, seed: int = 0, resamples: int = 1000) -> list[float]:
    """[low, high] of the mean: the 95 % percentile bootstrap over rows."""
    if not len(values):
        raise ValueError("an empty sequence has no mean")
    rng, values = np.random.default_rng(seed), np.asarray(values)
    means = [
        rng.choice(values, len(values)).mean() for _ in range(resamples)
    ]  # one at a time: together they need resamples × N
    return np.quantile(means, [0.025, 0.975]).tolist()


def calibration(chosen: Numbers, rejected: Numbers, bins: int = 10) -> list[dict[str, float]]:
    """How often the side the model prefers won, by how sure it was: σ(|margin|) in equal bins of [½, 1]; empty bins left out."""
    won, confidence = wins(chosen, rejected), 1 / (1 + np.exp(-np.abs(np.subtract(chosen, rejected))))
    places = np.array([min(int((c - 0.5) * 2 * bins), bins - 1) for c in confidence])
    return [
        {"confidence": fmean(confidence[rows]), "accuracy": fmean(won[rows]), "count": int(rows.sum())}
        for rows in (places == place for place in np.unique(places))
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """The expected calibration error of `calibration`'s bins: their mean |confidence − accuracy|, weighted by count."""
    return fmean((abs(b["confidence"] - b["accuracy"]) for b in bins), [b["count"] for b in bins])


def correlation(statistic: Callable[..., Any], x: Numbers, y: Numbers) -> float | None:
    """`statistic` (spearmanr or kendalltau) of two sequences; None where either is constant."""
    return float(statistic(x, y).statistic) if min(len(np.unique(x)), len(np.unique(y))) > 1 else None


def pair_metrics(
    chosen: Numbers,
    rejected: Numbers,
    lengths: Sequence[Numbers],
    sources: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Accuracy beside that of "the longer answer wins", margin, calibration and the pull of length; by source where two or more are named.

    `lengths` are a pair, the characters of the chosen answers and those of the rejected.
    """
    won, longer = wins(chosen, rejected), wins(*lengths)
    if not len(won):
        return {}
    names = sorted({source for source in sources or () if source is not None})
    rows = {name: np.array([source == name for source in sources or ()]) for name in names}
    return _judged(won, longer) | _defined(
        accuracy_longer_interval=interval(longer),
        margin=fmean(np.subtract(chosen, rejected)),
        calibration_error=calibration_error(calibration(chosen, rejected)),
        reward_length_correlation=correlation(
            spearmanr, np.concatenate([chosen, rejected]), np.concatenate(lengths)
        ),
        by_source={name: _judged(won[rows[name]], longer[rows[name]]) for name in names}
        if len(names) > 1
        else None,
    )


def rating_metrics(scores: Numbers, ratings: Numbers) -> dict[str, Any]:
    """How near the scores are to people's ratings, in value and in order."""
    if not len(scores):
        return {}
    rmse = float(root_mean_squared_error(ratings, scores))
    return {"rows": len(scores), "rmse": rmse, **_defined(spearman=correlation(spearmanr, scores, ratings))}


def label_metrics(
    logits: ArrayLike, labels: ArrayLike, classes: Sequence[str], positive: int
) -> dict[str, Any]:
    """What logits (N, C) say of labels (N,), indices into the C `classes`; AUROC and F1 are those of `positive` against the rest.

    AUROC ranks by log-odds, since a softmax fixes the logits of a row only up to a constant. `confusion` is {true: {predicted: count}}.
    """
    logits, labels = np.asarray(logits, dtype=float), np.asarray(labels)
    if not len(labels):
        return {}
    predicted = logits.argmax(1)
    truth, called = labels == positive, predicted == positive
    log_odds = logits[:, positive] - np.logaddexp.reduce(np.delete(logits, positive, axis=1), axis=1)
    confusion = confusion_matrix(labels, predicted, labels=range(len(classes))).tolist()
    figures = _defined(
        auroc=float(roc_auc_score(truth, log_odds)) if 0 < truth.sum() < len(truth) else None,
        f1=float(f1_score(truth, called)) if (truth | called).any() else None,
    )
    counts = {
        name: dict(zip(classes, row, strict=True)) for name, row in zip(classes, confusion, strict=True)
    }
    return {"rows": len(labels), **_accuracy(predicted == labels), **figures, "confusion": counts}


def ranking_metrics(scores: Sequence[Numbers], ranks: Sequence[Numbers]) -> dict[str, Any]:
    """How the scores of each prompt's answers agree with their ranks (1 is best, ties allowed); each figure is a mean over prompts.

    `top_1` is the share of the highest-scored answers that have the best rank, `accuracy` that of the strictly ordered pairs won.
    """
    prompts = [(np.asarray(s), np.asarray(r)) for s, r in zip(scores, ranks, strict=True)]
    if not prompts:
        return {}
    taus = [tau for s, r in prompts if (tau := correlation(kendalltau, s, -r)) is not None]
    top = [fmean(r[s == s.max()] == r.min()) for s, r in prompts]
    ordered = [(s, *np.nonzero(r[:, None] < r)) for s, r in prompts]
    won = [pair_accuracy(s[better], s[worse]) for s, better, worse in ordered if len(better)]
    figures = _defined(kendall_tau=fmean(taus) if taus else None, top_1=fmean(top))
    return {"rankings": len(prompts), **figures, **(_accuracy(won) if won else {})}


def _accuracy(values: Numbers) -> dict[str, Any]:
    return {"accuracy": fmean(values), "accuracy_interval": interval(values)}


def _judged(won: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
    return {"pairs": len(won), **_accuracy(won), "accuracy_longer": fmean(longer)}


def _defined(**figures: Any) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if value is not None}
