"""95 % intervals of metrics. None has zero width because a handful of rows happen to agree."""

import math
from collections.abc import Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray

Z = 1.959963984540054  # the normal distribution's quantile at 97.5 %


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
