"""Statistics of rows that count several times, for many such weightings at once.

Each takes weights (R, N), how often each of N rows counts, and columns (N,). It returns (R,): for each
weighting what the plain statistic gives if each row is repeated so often. It is NaN if that is undefined.
"""

import numpy as np


def mean(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the means."""
    return ratio(weights, values, np.ones(len(values)))


def ratio(weights: np.ndarray, parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Return the sum of `parts` over the sum of `wholes`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (weights @ parts) / (weights @ wholes)


def rmse(weights: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return the square roots of the mean squared errors."""
    return np.sqrt(mean(weights, errors**2))


def f1(weights: np.ndarray, truths: np.ndarray, calls: np.ndarray) -> np.ndarray:
    """Return F1 = 2 hits / (truths + calls); both are 1 for the positive class and 0 for the others."""
    return ratio(weights, 2 * truths * calls, truths + calls)


def auroc(weights: np.ndarray, positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the share of pairs of a positive and a negative row that the scores order, ties half."""
    won = np.einsum("rn,rn->r", weights * positive, _midranks(weights * (1 - positive), scores))
    with np.errstate(divide="ignore", invalid="ignore"):
        return won / ((weights @ positive) * (weights @ (1 - positive)))


def spearman(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's correlations of the ranks, where equal values share their mean rank."""
    total = weights.sum(1, keepdims=True)
    centred_x, centred_y = (_midranks(weights, values) - total / 2 for values in (x, y))
    products = [
        (a * b * weights).sum(1)
        for a, b in ((centred_x, centred_y), (centred_x, centred_x), (centred_y, centred_y))
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        return products[0] / np.sqrt(products[1] * products[2])


def _midranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return (R, N): the weight of all smaller values, and half the weight of the equal ones."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    blocks = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(blocks, axis=1) - blocks / 2
    return ranks[:, np.searchsorted(ordered[starts], values)]
