"""What an answer costs and gains: best-of-n for every n, win rates, how varied the answers are. Pure functions over columns of answers."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from pipeline.reward.metrics import interval, wins

REWARDS = ("reward", "gold_reward", "scorer_reward")


def kl_bound(n: int) -> float:
    """No less than the KL of best-of-n to what it samples from, in nats: log n − (n − 1)/n (Beirami et al. 2024, theorem 1)."""
    return math.log(n) - (n - 1) / n


def overoptimization_curve(distance: float, alpha: float, beta: float, line: str) -> float:
    """What is gained at a distance d = √KL: d(α − β d) by best-of-n, d(α − β log d) by reinforcement learning (Gao et al. 2022, "Scaling
    laws for reward model overoptimization", eq. 1)."""
    return (
        distance * (alpha - beta * (distance if line == "best-of-n" else math.log(distance)))
        if distance
        else 0.0
    )


def fit_curves(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By line of the frontier and reward the α and β of `gao` that fit its points best (least squares), and where it starts: SFT's reward.
    Left out where fewer than three points have gone anywhere."""
    found: dict[str, Any] = {}
    for line in dict.fromkeys(point["line"] for point in points if point.get("line")):
        of_line = [
            point for point in points if line in (point.get("line"), point["name"]) and (point["kl"] or 0) > 0
        ]
        for reward in REWARDS:
            seen = [
                (math.sqrt(point["kl"]), point[reward] - points[0][reward])
                for point in of_line
                if point.get(reward) is not None
            ]
            if len(seen) >= 3:
                design = [
                    [
                        overoptimization_curve(distance, 1, 0, line),
                        overoptimization_curve(distance, 0, 1, line),
                    ]
                    for distance, _ in seen
                ]
                (alpha, beta), *_ = np.linalg.lstsq(
                    np.array(design), np.array([gain for _, gain in seen]), rcond=None
                )
                found.setdefault(line, {})[reward] = {
                    "start": points[0][reward],
                    "alpha": float(alpha),
                    "beta": float(beta),
                }
    return found


def best_of_n_means(
    rewards: Sequence[float], figures: Mapping[str, Sequence[float]], samples: int, n: int
) -> dict[str, float]:
    """The mean of each figure over the answers that best-of-n picks by reward, from `samples` ≥ n answers to each prompt, a prompt's
    together: over all ways to draw n of them (Nakano et al. 2021, "WebGPT", appendix I)."""
    chances = [
        math.comb(rank, n - 1) / math.comb(samples, n) for rank in range(samples)
    ]  # that the answer of this rank is the best drawn
    order = np.argsort(np.reshape(rewards, (-1, samples)), axis=1, kind="stable")
    ranked = {
        name: np.take_along_axis(np.reshape(column, (-1, samples)).astype(float), order, 1)
        for name, column in figures.items()
    }
    return {name: float((column @ chances).mean()) for name, column in ranked.items()}


def win_rate(
    scores: Sequence[float], rivals: Sequence[float], lengths: Sequence[int], rival_lengths: Sequence[int]
) -> dict[str, Any]:
    """How often an answer scores higher than its rival, ties half, with a 95 % interval; and what that would be at equal lengths.

    The latter is a logistic regression on the difference of lengths in its standard deviations, through a tanh, read at zero (Dubois et
    al. 2024, "Length-Controlled AlpacaEval", without its term for each prompt).
    """
    won = wins(scores, rivals)
    longer = np.subtract(lengths, rival_lengths).astype(float)
    found: dict[str, Any] = {"rate": fmean(won), "interval": interval(won)}
    if (
        0 < won.mean() < 1 and longer.min() <= 0 <= longer.max()
    ):  # or equal lengths would be beyond all that was seen
        x = np.tanh(longer / (longer.std() or 1.0))[:, None]
        # A tie is half a win and half a loss.
        model = LogisticRegression(C=np.inf).fit(
            np.concatenate([x, x]), np.repeat([1, 0], len(won)), sample_weight=np.concatenate([won, 1 - won])
        )
        found["length_controlled"] = float(1 / (1 + np.exp(-model.intercept_[0])))
    return found


def length_correlation(rewards: Sequence[float], lengths: Sequence[int], samples: int) -> float | None:
    """Pearson's correlation of reward and length among the `samples` answers to a prompt; None where nothing varies."""
    about = [np.reshape(values, (-1, samples)).astype(float) for values in (rewards, lengths)]
    x, y = ((values - values.mean(1, keepdims=True)).ravel() for values in about)
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread > 0 else None


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams (Li et al. 2016): low where answers repeat each other, 0 where there are none."""
    found = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(found)) / len(found) if found else 0.0
