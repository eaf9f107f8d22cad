"""What a reward model is worth on held-out records of every kind there is, as those who use it will read it."""

from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from pipeline.models.chat import completion_text
from pipeline.reward import metrics
from pipeline.reward.model import RewardModel

REFERENCE_ROWS = 256


def held_out_split(data: DatasetDict) -> Dataset:
    """The test split, or validation where test is empty."""
    return data["test"] if len(data["test"]) else data["validation"]


def evaluate_reward_model(reward: RewardModel, records: dict[str, Dataset]) -> dict[str, Any]:
    """Figures of each kind of records that has rows; labels only of a classifier with these classes, ratings only of a regression."""
    meant = {"comparisons": True, "rankings": True, "ratings": reward.settings.objective == "regression"}
    meant["labels"] = reward.settings.objective == "classification"
    measures = {
        "comparisons": _evaluate_pairs,
        "rankings": _evaluate_rankings,
        "ratings": _evaluate_ratings,
        "labels": _evaluate_labels,
    }
    return {
        kind: measures[kind](reward, rows) for kind, rows in records.items() if meant.get(kind) and len(rows)
    }


def _evaluate_pairs(reward: RewardModel, pairs: Dataset) -> dict[str, Any]:
    scores = reward.score(pairs["prompt"][:] * 2, pairs["chosen"][:] + pairs["rejected"][:])
    chosen, rejected = scores[: len(pairs)], scores[len(pairs) :]
    lengths = [[len(completion_text(text)) for text in pairs[side]] for side in ("chosen", "rejected")]
    sources = pairs["source"][:] if "source" in pairs.column_names else None
    found = metrics.pair_metrics(chosen, rejected, lengths, sources)
    return found | {"calibration": metrics.calibration(chosen, rejected)}


def _evaluate_rankings(reward: RewardModel, rankings: Dataset) -> dict[str, Any]:
    prompts = [
        prompt
        for prompt, answers in zip(rankings["prompt"], rankings["responses"], strict=True)
        for _ in answers
    ]
    scores = iter(reward.score(prompts, [answer for answers in rankings["responses"] for answer in answers]))
    return metrics.ranking_metrics(
        [[next(scores) for _ in ranks] for ranks in rankings["ranks"]], rankings["ranks"][:]
    )


def _evaluate_ratings(reward: RewardModel, ratings: Dataset) -> dict[str, Any]:
    return metrics.rating_metrics(
        reward.score(ratings["prompt"][:], ratings["completion"][:]), ratings["rating"][:]
    )


def _evaluate_labels(reward: RewardModel, labels: Dataset) -> dict[str, Any]:
    logits = reward.logits(labels["prompt"][:], labels["completion"][:]).numpy()
    return metrics.label_metrics(logits, labels["label"][:], reward.settings.outputs, reward.settings.logit)


def reference_statistics(reward: RewardModel, rows: Dataset) -> dict[str, Any]:
    """Of all answers of the first rows, as `Settings` names them: mean and standard deviation of the raw reward, the mean of their tokens,
    and the slope of the reward on these (least squares, each prompt's answers about their own mean where there are several)."""
    sample = rows.select(range(min(REFERENCE_ROWS, len(rows))))
    columns = [
        sample[name][:] for name in ("chosen", "rejected", "completion") if name in sample.column_names
    ]
    answers = [list(each) for each in zip(*columns, strict=True)] if columns else sample["responses"][:]
    prompts = [prompt for prompt, each in zip(sample["prompt"], answers, strict=True) for _ in each]
    flat = [answer for each in answers for answer in each]
    scores, lengths = (
        np.array(reward.score(prompts, flat, alpha=1.0)),
        np.array(reward.lengths(flat), dtype=float),
    )
    groups = (
        np.repeat(range(len(answers)), [len(each) for each in answers])
        if len(flat) > len(answers)
        else np.zeros(len(flat), int)
    )
    about = [
        values - (np.bincount(groups, values) / np.bincount(groups))[groups] for values in (scores, lengths)
    ]
    slope = float(about[0] @ about[1] / (about[1] @ about[1] or 1.0))
    spread = float(scores.std()) or 1.0
    return {
        "reward_mean": float(scores.mean()),
        "reward_std": spread,
        "length_mean": float(lengths.mean()),
        "length_slope": slope,
    }
