"""95 % intervals that resample prompts: rows of one prompt are alike, so many rows may say little.

None has zero width because a handful of prompts happen to agree.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t

Numbers = Sequence[float] | np.ndarray
Groups = Sequence[int] | Sequence[str] | np.ndarray | None
Statistic = Callable[..., np.ndarray]

Z = 1.959963984540054  # the normal distribution's quantile at 97.5 %
RESAMPLES = 1000
CELLS = 2_000_000  # weights that are held at a time, 16 MB


def bootstrap_interval(
    statistic: Statistic,
    columns: Sequence[Numbers],
    groups: Groups = None,
    low: float | None = None,
    high: float | None = None,
    informative: int | None = None,
) -> list[float] | None:
    """Return the interval [low, high] of a statistic of rows, by resampling groups (prompts).

    `statistic(weights, *columns)` is one of `pipeline.reward.weighted`: weights (R, N) and columns (N,) to
    (R,). `groups` (N,) names the group of each row; without it each row is one. `informative` is the number
    of groups that the statistic rests on, if not all: of many prompts few may be positive.

    It is Student's t around the statistic with the bootstrap's standard error, on a scale on which the limits
    `low` and `high` are infinitely far: the logit, which for a correlation is Fisher's transform, or without
    `high` the logarithm. This covers better than percentiles or BCa if prompts are few. The seed is fixed.

    If one group is informative or all resamples agree, a statistic with both limits has the interval of a
    share of so many groups, and others have None. Raises `ValueError` if there are no rows, or if the
    statistic is beyond its limits.
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    rows = len(arrays[0])
    if not rows:
        raise ValueError("an empty sequence has no interval")
    names = np.arange(rows) if groups is None else np.asarray(groups)
    numbers = np.unique(names, return_inverse=True)[1]
    total = int(numbers.max()) + 1
    count = total if informative is None else informative

    value = float(statistic(np.ones((1, rows)), *arrays)[0])
    estimates = np.concatenate(
        [statistic(weights[:, numbers], *arrays) for weights in _draw_weights(total, rows)]
    )
    estimates = estimates[np.isfinite(estimates)]  # of one class drawn alone there is no AUROC
    if count > 1 and len(estimates) and np.ptp(estimates) > 1e-9 * np.abs(estimates).max():
        # A bootstrap's variance is that of a sample divided by n; n − 1 makes it unbiased.
        error = float(estimates.std()) * math.sqrt(count / (count - 1))
        return _spread(value, float(t.ppf(0.975, count - 1)) * error, low, high)
    if low is None or high is None:
        return None
    return [low + (high - low) * bound for bound in wilson_interval((value - low) / (high - low), count)]


def wilson_interval(share: float, rows: float) -> list[float]:
    """Return the score interval of a share of so many rows (Wilson 1927)."""
    centre = share + Z**2 / (2 * rows)
    half = Z * math.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    low, high = ((centre + sign * half) / (1 + Z**2 / rows) for sign in (-1, 1))
    return [0.0 if share <= 0 else low, 1.0 if share >= 1 else high]  # without rounding errors


def _draw_weights(groups: int, rows: int) -> Iterator[np.ndarray]:
    """Yield (R, groups): how often each group is drawn in R of the resamples, as many as memory is for."""
    rng, step = np.random.default_rng(0), max(1, CELLS // rows)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = rng.integers(groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * groups).reshape(size, groups).astype(float)


def _spread(value: float, half: float, low: float | None, high: float | None) -> list[float]:
    """Return value ± half, where the limits are infinitely far (by the delta method)."""
    if low is None:
        return [value - half, value + half]
    if not low < value < (math.inf if high is None else high):
        raise ValueError(f"a statistic of {value} is not between {low} and {high}")
    if high is None:
        factor = math.exp(half / (value - low))
        return [low + (value - low) / factor, low + (value - low) * factor]
    share = (value - low) / (high - low)
    half /= (high - low) * share * (1 - share)
    return [low + (high - low) * float(expit(logit(share) + sign * half)) for sign in (-1, 1)]
