"""What a reward model is worth on held-out records of every kind there is, as those who use it will read it."""

import statistics
from typing import Any

from datasets import Dataset, DatasetDict

from pipeline.encoding import plain
from pipeline.reward import metrics
from pipeline.reward.model import RewardModel

REFERENCE_ROWS = 256


def held_out(data: DatasetDict) -> Dataset:
    """The test split, or validation where test is empty."""
    return data["test"] if len(data["test"]) else data["validation"]


def measure(reward: RewardModel, records: dict[str, Dataset]) -> dict[str, Any]:
    """Figures of each kind of records that has rows; labels only of a classifier with these classes, ratings only of a regression."""
    meant = {"comparisons": True, "rankings": True, "ratings": reward.settings.objective == "regression"}
    meant["labels"] = reward.settings.objective == "classification"
    measures = {"comparisons": on_pairs, "rankings": on_rankings, "ratings": on_ratings, "labels": on_labels}
    return {kind: measures[kind](reward, rows) for kind, rows in records.items() if meant.get(kind) and len(rows)}


def on_pairs(reward: RewardModel, pairs: Dataset) -> dict[str, Any]:
    scores = reward.score(pairs["prompt"][:] * 2, pairs["chosen"][:] + pairs["rejected"][:])
    chosen, rejected = scores[: len(pairs)], scores[len(pairs) :]
    lengths = [[len(plain(text)) for text in pairs[side]] for side in ("chosen", "rejected")]
    sources = pairs["source"][:] if "source" in pairs.column_names else None
    found = metrics.pair_metrics(chosen, rejected, lengths, sources)
    return found | {"calibration": metrics.calibration(chosen, rejected)}


def on_rankings(reward: RewardModel, rankings: Dataset) -> dict[str, Any]:
    prompts = [prompt for prompt, answers in zip(rankings["prompt"], rankings["responses"], strict=True) for _ in answers]
    scores = iter(reward.score(prompts, [answer for answers in rankings["responses"] for answer in answers]))
    return metrics.ranking_metrics([[next(scores) for _ in ranks] for ranks in rankings["ranks"]], rankings["ranks"][:])


def on_ratings(reward: RewardModel, ratings: Dataset) -> dict[str, Any]:
    return metrics.rating_metrics(reward.score(ratings["prompt"][:], ratings["completion"][:]), ratings["rating"][:])


def on_labels(reward: RewardModel, labels: Dataset) -> dict[str, Any]:
    logits = reward.logits(labels["prompt"][:], labels["completion"][:]).numpy()
    return metrics.label_metrics(logits, labels["label"][:], reward.settings.outputs, reward.settings.logit)


def reference_statistics(reward: RewardModel, rows: Dataset) -> tuple[float, float]:
    """Mean and standard deviation of the raw reward over all answers of the first rows."""
    sample = rows.select(range(min(REFERENCE_ROWS, len(rows))))
    columns = [sample[name][:] for name in ("chosen", "rejected", "completion") if name in sample.column_names]
    answers = [list(each) for each in zip(*columns, strict=True)] if columns else sample["responses"][:]
    prompts = [prompt for prompt, each in zip(sample["prompt"], answers, strict=True) for _ in each]
    scores = reward.score(prompts, [answer for each in answers for answer in each], alpha=1.0)
    return statistics.fmean(scores), statistics.pstdev(scores) or 1.0
