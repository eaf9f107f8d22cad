"""95 % intervals of metrics, by a bootstrap that resamples prompts: rows of one prompt are not independent.

None has zero width because a handful of prompts happen to agree.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

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
) -> list[float] | None:
    """Return the interval [low, high] of a statistic of rows, by resampling groups (prompts).

    `statistic(weights, *columns)` is one of `pipeline.reward.weighted`: weights (R, N) and columns (N,) to
    (R,). `groups` (N,) names the group of each row; without it each row is one. It is the percentile
    bootstrap, widened as a t-interval is for few groups (Hesterberg 2015, "What teachers should know about
    the bootstrap", section 5.3). The seed is fixed, so equal rows have equal intervals.

    If all resamples agree or a resample has no value, the groups do not tell how far the statistic varies.
    Then a statistic between `low` and `high` has the interval of a share of so many groups; without these
    limits the answer is None. Raises `ValueError` if there are no rows.
    """
    columns = [np.asarray(column, dtype=float) for column in columns]
    rows = len(columns[0])
    if not rows:
        raise ValueError("an empty sequence has no interval")
    numbers = np.arange(rows) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(numbers.max()) + 1
    value = float(statistic(np.ones((1, rows)), *columns)[0])

    estimates = _resample(statistic, columns, numbers, count)
    spread = float(np.ptp(estimates))
    if count > 1 and spread > 1e-12 * max(1.0, abs(value)):  # NaN is not greater
        tail = float(norm.cdf(-math.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1)))
        bounds = np.quantile(estimates, [tail, 1 - tail])
        return [min(float(bounds[0]), value), max(float(bounds[1]), value)]
    if low is None or high is None:
        return None
    return [low + (high - low) * bound for bound in wilson_interval((value - low) / (high - low), count)]


def mean_interval(
    values: Numbers,
    groups: Sequence[Any] | np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
) -> list[float] | None:
    """Return the `bootstrap_interval` of the mean over rows: sums over the drawn groups, by their rows."""
    if groups is None:
        groups = range(len(values))
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(numbers, weights=np.asarray(values, dtype=float))
    return bootstrap_interval(weighted.ratio, [sums, np.bincount(numbers)], None, low, high)


def _resample(
    statistic: Callable[..., np.ndarray], columns: Sequence[np.ndarray], numbers: np.ndarray, count: int
) -> np.ndarray:
    """Return the statistic of each resample of the groups below `count`; `numbers` (N,) has each row's."""
    rng, estimates = np.random.default_rng(0), []
    step = max(1, CELLS // len(numbers))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
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
