"""Statistics of responses: best-of-n for every n, win rates, reward-KL fits, variety.

Pure functions over columns of responses, a prompt's responses in consecutive rows.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from pipeline.reward.intervals import Groups
from pipeline.reward.metrics import measure_mean, wins

REWARDS = ("reward", "gold_reward", "scorer_reward")
BEST_OF_N = "best-of-n"  # the line whose curve has the form of best-of-n
MIN_POINTS = 3  # fewer do not determine a fit


def kl_bound(n: int) -> float:
    """Return an upper bound in nats on the KL of best-of-n to the policy that it samples from.

    It is log n − (n − 1)/n (Beirami et al. 2024, theorem 1).
    """
    return math.log(n) - (n - 1) / n


def overoptimization_curve(distance: float, alpha: float, beta: float, line: str) -> float:
    """Return the gain in reward at a distance d = √KL from the initial policy.

    Best-of-n gains d(α − β d), reinforcement learning d(α − β log d) (Gao et al. 2022, "Scaling laws for
    reward model overoptimization", eq. 1).
    """
    if not distance:
        return 0.0
    return distance * (alpha - beta * (distance if line == BEST_OF_N else math.log(distance)))


def fit_curves(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fit `overoptimization_curve` to the points of each line, for each reward, by least squares.

    Returns {line: {reward: {start, alpha, beta}}}; `start` is the reward of SFT, the first point. A line
    needs three points with a KL above 0 and the reward; else it has no fit.
    """
    fits: dict[str, Any] = {}
    for line in dict.fromkeys(point["line"] for point in points if point.get("line")):
        on_line = [
            point for point in points if line in (point.get("line"), point["name"]) and (point["kl"] or 0) > 0
        ]
        for reward in REWARDS:
            scored = [point for point in on_line if point.get(reward) is not None]
            if len(scored) >= MIN_POINTS:
                start = points[0][reward]
                distances = [math.sqrt(point["kl"]) for point in scored]
                alpha, beta = _fit_curve(line, distances, [point[reward] - start for point in scored])
                fits.setdefault(line, {})[reward] = {"start": start, "alpha": alpha, "beta": beta}
    return fits


def _fit_curve(line: str, distances: Sequence[float], gains: Sequence[float]) -> tuple[float, float]:
    """Return (α, β) of the least-squares fit: the curve is linear in both."""
    design = [
        [overoptimization_curve(d, 1, 0, line), overoptimization_curve(d, 0, 1, line)] for d in distances
    ]
    (alpha, beta), *_ = np.linalg.lstsq(np.array(design), np.array(gains), rcond=None)
    return float(alpha), float(beta)


def best_of_n_means(
    rewards: Sequence[float], columns: Mapping[str, Sequence[float]], samples: int, n: int
) -> dict[str, np.ndarray]:
    """Return for each column and prompt the mean over the responses that best-of-n picks by reward.

    Each prompt has `samples` ≥ n responses. The mean is over all ways to sample n of them without
    replacement (Nakano et al. 2021, "WebGPT", appendix I).
    """
    # The probability that the response of this rank, lowest reward first, is the best of the n.
    chances = [math.comb(rank, n - 1) / math.comb(samples, n) for rank in range(samples)]
    order = np.argsort(np.reshape(rewards, (-1, samples)), axis=1, kind="stable")
    ranked = {
        name: np.take_along_axis(np.reshape(column, (-1, samples)).astype(float), order, 1)
        for name, column in columns.items()
    }
    return {name: column @ chances for name, column in ranked.items()}


def win_rate(
    scores: Sequence[float],
    rivals: Sequence[float],
    lengths: Sequence[int],
    rival_lengths: Sequence[int],
    groups: Groups = None,
) -> dict[str, Any]:
    """Return how often a response scores higher than its rival, ties half.

    `rate` comes with its 95 % `interval` over prompts, which `groups` numbers, and the number of `rows`.
    `length_controlled` is the rate at equal lengths: a logistic regression on the difference of lengths, in
    its standard deviations and through a tanh, evaluated at zero (Dubois et al. 2024, "Length-Controlled
    AlpacaEval", without its term for each prompt). It is left out if equal lengths are outside the observed
    range.
    """
    won = wins(scores, rivals)
    longer = np.subtract(lengths, rival_lengths).astype(float)
    share = measure_mean("rate", won, groups)
    rates: dict[str, Any] = {"rate": share["rate"], "interval": share["rate_interval"], "rows": len(won)}
    if 0 < won.mean() < 1 and longer.min() <= 0 <= longer.max():
        x = np.tanh(longer / (longer.std() or 1.0))[:, None]
        # A tie is half a win and half a loss.
        model = LogisticRegression(C=np.inf).fit(
            np.concatenate([x, x]), np.repeat([1, 0], len(won)), sample_weight=np.concatenate([won, 1 - won])
        )
        rates["length_controlled"] = float(1 / (1 + np.exp(-model.intercept_[0])))
    return rates


def length_correlation(rewards: Sequence[float], lengths: Sequence[int], samples: int) -> float | None:
    """Return Pearson's correlation of reward and length within prompts of `samples` responses.

    None if the rewards or the lengths do not vary within any prompt.
    """
    grouped = [np.reshape(values, (-1, samples)).astype(float) for values in (rewards, lengths)]
    x, y = ((values - values.mean(1, keepdims=True)).ravel() for values in grouped)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Return distinct n-grams of words over all n-grams (Li et al. 2016).

    It is low if the responses repeat each other, and 0 if there are no n-grams.
    """
    ngrams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
