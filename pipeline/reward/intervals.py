"""95 % intervals of metrics, by a bootstrap that resamples prompts: rows of one prompt are not independent.

None has zero width because a handful of prompts happen to agree.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t

from pipeline.reward import weighted

Numbers = Sequence[float] | np.ndarray

Z = 1.959963984540054  # the normal distribution's quantile at 97.5 %
RESAMPLES = 1000
CELLS = 2_000_000  # of the weights that are held at a time


def bootstrap_interval(
    statistic: Callable[..., np.ndarray],
    columns: Sequence[Numbers],
    groups: Sequence[Any] | np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
    informative: int | None = None,
) -> list[float] | None:
    """Return the interval [low, high] of a statistic of rows, by resampling groups (prompts).

    `statistic(weights, *columns)` is one of `pipeline.reward.weighted`: weights (R, N) and columns (N,) to
    (R,). `groups` (N,) names the group of each row; without it each row is one. `informative` is the number
    of groups that the statistic rests on, if not all: the positives of an AUROC may be few.

    It is Student's t around the statistic with the bootstrap's standard error (Efron and Tibshirani 1993,
    chapter 12), on a scale on which `low` and `high` are infinitely far: the logit, which is Fisher's
    transform for a correlation, or the logarithm without `high`. The seed is fixed.

    If one group is informative or all resamples agree, a statistic with both limits has the interval of a
    share of so many groups, and another has None. Raises `ValueError` if there are no rows.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    if not len(columns[0]):
        raise ValueError("an empty sequence has no interval")
    names = np.arange(len(columns[0])) if groups is None else np.asarray(groups)
    numbers = np.unique(names, return_inverse=True)[1]
    total = int(numbers.max()) + 1
    count = total if informative is None else informative

    value = float(statistic(np.ones((1, len(numbers))), *columns)[0])
    estimates = _resample(statistic, columns, numbers, total)
    estimates = estimates[np.isfinite(estimates)]  # one class drawn: undefined
    if count > 1 and len(estimates) > 1 and np.ptp(estimates) > 1e-9 * max(1.0, abs(value)):
        # The bootstrap divides by the number of groups, an unbiased variance by one fewer.
        error = float(np.std(estimates)) * math.sqrt(count / (count - 1))
        return _around(value, float(t.ppf(0.975, count - 1)) * error, low, high)
    if low is None or high is None:
        return None
    return [low + (high - low) * bound for bound in wilson_interval((value - low) / (high - low), count)]


def mean_interval(
    values: Numbers,
    groups: Sequence[Any] | np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
) -> list[float] | None:
    """Return the `bootstrap_interval` of the mean over rows: the sum of the drawn groups by their rows."""
    names = np.arange(len(values)) if groups is None else np.asarray(groups)
    numbers = np.unique(names, return_inverse=True)[1]
    sums = np.bincount(numbers, weights=np.asarray(values, dtype=float))
    return bootstrap_interval(weighted.ratio, [sums, np.bincount(numbers)], None, low, high)


def _around(value: float, half: float, low: float | None, high: float | None) -> list[float]:
    """Return value ± half, computed on a scale on which the limits are infinitely far (delta method)."""
    if low is None:
        return [value - half, value + half]
    if high is None:
        factor = math.exp(half / (value - low))
        return [low + (value - low) / factor, low + (value - low) * factor]
    width = high - low
    share = (value - low) / width
    half /= width * share * (1 - share)
    return [low + width * float(expit(logit(share) + sign * half)) for sign in (-1, 1)]


def _resample(
    statistic: Callable[..., np.ndarray], columns: Sequence[np.ndarray], numbers: np.ndarray, total: int
) -> np.ndarray:
    """Return the statistic of each resample of the groups below `total`; `numbers` (N,) has each row's."""
    rng, estimates = np.random.default_rng(0), []
    step = max(1, CELLS // len(numbers))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = rng.integers(total, size=(size, total)) + total * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * total).reshape(size, total)
        estimates.append(statistic(weights[:, numbers].astype(float), *columns))
    return np.concatenate(estimates)


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


def bounded_interval(values: Numbers, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Return the interval of the mean of values between `low` and `high`, such as wins.

    It is the bootstrap's. If all values are equal, which says nothing to a bootstrap, it is that of a share.
    """
    if len(np.unique(values)) != 1:
        return interval(values)
    share = (float(values[0]) - low) / (high - low)
    return [low + (high - low) * bound for bound in wilson_interval(share, len(values))]


def wilson_interval(share: float, rows: float) -> list[float]:
    """Return the score interval of a share of so many rows (Wilson 1927)."""
    centre = share + Z**2 / (2 * rows)
    half = Z * math.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    low, high = ((centre + sign * half) / (1 + Z**2 / rows) for sign in (-1, 1))
    return [0.0 if share <= 0 else low, 1.0 if share >= 1 else high]  # without rounding errors


def f1_interval(hits: int, misses: int) -> list[float]:
    """Return the interval of F1 = 2 hits / (2 hits + misses); there is at least one of either.

    The share of hits among hits and misses is binomial, and F1 rises with it.
    """
    shares = wilson_interval(hits / (hits + misses), hits + misses)
    return [2 * share / (1 + share) for share in shares]


def auroc_interval(auroc: float, positives: int, negatives: int) -> list[float]:
    """Return the interval of an AUROC: that of a share with the variance of Hanley and McNeil (1982)."""
    inflation = (positives - 1) * (1 - auroc) / (2 - auroc) + (negatives - 1) * auroc / (1 + auroc)
    return wilson_interval(auroc, positives * negatives / (1 + inflation))


def correlation_interval(correlation: float, rows: int) -> list[float]:
    """Return the interval of a correlation, by Fisher's transform (Bonett and Wright 2000).

    Three rows or fewer say nothing of it.
    """
    if rows <= 3:
        return [-1.0, 1.0]
    limit = 1 - 1 / rows**2  # the transform of ±1 is infinite
    centre = math.atanh(max(-limit, min(limit, correlation)))
    half = Z * math.sqrt((1 + correlation**2 / 2) / (rows - 3))
    low, high = math.tanh(centre - half), math.tanh(centre + half)
    return [min(low, correlation), max(high, correlation)]
