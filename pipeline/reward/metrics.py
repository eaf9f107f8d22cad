"""What a reward model is worth on pairs. A tie counts half: it is as good as a coin."""

import math
from collections.abc import Sequence

from datasets import Dataset, DatasetDict

from pipeline.encoding import plain
from pipeline.reward.model import RewardModel


def held_out(data: DatasetDict) -> Dataset:
    """The test split, or validation where test is empty."""
    return data["test"] if len(data["test"]) else data["validation"]


def score_pairs(reward: RewardModel, pairs: Dataset) -> tuple[list[float], list[float]]:
    """The scores of the chosen and of the rejected answers."""
    chosen, rejected = (reward.score(pairs["prompt"][:], pairs[side][:]) for side in ("chosen", "rejected"))
    return chosen, rejected


def pair_metrics(chosen: Sequence[float], rejected: Sequence[float], pairs: Dataset) -> dict[str, float]:
    """Accuracy beside "longer wins" (empty where there are no pairs)."""
    if not len(pairs):
        return {}
    longer = [[len(plain(text)) for text in pairs[side]] for side in ("chosen", "rejected")]
    return {"pairs": len(pairs), "accuracy": pair_accuracy(chosen, rejected), "accuracy_longer": pair_accuracy(*longer)}


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """The fraction of pairs whose chosen answer scores higher, over rows."""
    wins = [(c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)]
    return sum(wins) / len(wins)


def calibration(chosen: Sequence[float], rejected: Sequence[float], bins: int = 10) -> list[dict[str, float]]:
    """How often the side the model prefers won, by how sure it was: σ(|margin|) in equal bins of [½, 1]; empty bins left out."""
    found: dict[int, list[tuple[float, float]]] = {}
    for margin in (c - r for c, r in zip(chosen, rejected, strict=True)):
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        found.setdefault(min(int((confidence - 0.5) * 2 * bins), bins - 1), []).append((confidence, (margin > 0) + 0.5 * (margin == 0)))
    return [
        {"confidence": sum(c for c, _ in rows) / len(rows), "accuracy": sum(w for _, w in rows) / len(rows), "count": len(rows)}
        for _, rows in sorted(found.items())
    ]
