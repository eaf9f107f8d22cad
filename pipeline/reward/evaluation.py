"""Evaluate a reward model on held-out records of every kind, with the scores that its users will get."""

from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from pipeline.data.identity import number_questions
from pipeline.data.schema import KINDS
from pipeline.models.chat import response_text
from pipeline.reward import metrics
from pipeline.reward.model import RewardModel
from pipeline.reward.step_metrics import step_metrics
from pipeline.reward.steps import read_steps

REFERENCE_ROWS = 256


def held_out_split(data: DatasetDict) -> Dataset:
    """Return the test split, or validation if test is empty."""
    return data["test"] if len(data["test"]) else data["validation"]


def evaluate_reward_model(reward: RewardModel, records: dict[str, Dataset]) -> dict[str, Any]:
    """Return the metrics of each kind of records that has rows.

    Labels are evaluated only for a classifier with these classes, ratings only for a regression, steps only
    for a stepwise model.
    """
    applies = {
        "comparisons": True,
        "rankings": True,
        "ratings": reward.settings.objective == "regression",
        "labels": reward.settings.objective == "classification",
        "steps": reward.settings.is_stepwise,
    }
    evaluations = {
        "comparisons": _evaluate_pairs,
        "rankings": _evaluate_rankings,
        "ratings": _evaluate_ratings,
        "labels": _evaluate_labels,
        "steps": _evaluate_steps,
    }
    return {
        kind: evaluations[kind](reward, rows)
        for kind, rows in records.items()
        if applies.get(kind) and len(rows)
    }


def _evaluate_pairs(reward: RewardModel, pairs: Dataset) -> dict[str, Any]:
    if "preference" in pairs.column_names:  # a tie has no winner to agree with
        pairs = pairs.select([row for row, share in enumerate(pairs["preference"]) if share != 0.5])
    scores = reward.score(pairs["prompt"][:] * 2, pairs["chosen"][:] + pairs["rejected"][:])
    chosen, rejected = scores[: len(pairs)], scores[len(pairs) :]
    lengths = [[len(response_text(text)) for text in pairs[side]] for side in ("chosen", "rejected")]
    sources = pairs["source"][:] if "source" in pairs.column_names else None
    groups = number_questions(pairs["prompt"])
    return metrics.pair_metrics(chosen, rejected, lengths, sources, groups) | {
        "calibration": metrics.calibration(chosen, rejected)
    }


def _evaluate_rankings(reward: RewardModel, rankings: Dataset) -> dict[str, Any]:
    prompts, responses = _flatten(rankings["prompt"], rankings["responses"])
    scores = iter(reward.score(prompts, responses))
    by_prompt = [[next(scores) for _ in ranks] for ranks in rankings["ranks"]]
    return metrics.ranking_metrics(by_prompt, rankings["ranks"][:], number_questions(rankings["prompt"]))


def _evaluate_ratings(reward: RewardModel, ratings: Dataset) -> dict[str, Any]:
    scores = reward.score(ratings["prompt"][:], ratings["completion"][:])
    return metrics.rating_metrics(scores, ratings["rating"][:], number_questions(ratings["prompt"]))


def _evaluate_labels(reward: RewardModel, labels: Dataset) -> dict[str, Any]:
    logits = reward.logits(labels["prompt"][:], labels["completion"][:]).numpy()
    classes, groups = reward.settings.outputs, number_questions(labels["prompt"])
    return metrics.label_metrics(logits, labels["label"][:], classes, reward.settings.logit, groups)


def _evaluate_steps(reward: RewardModel, steps: Dataset) -> dict[str, Any]:
    labels = list(map(KINDS["steps"].target, steps))  # type: ignore[arg-type]
    scores = reward.score_steps(steps["prompt"][:], steps["completions"][:])
    return step_metrics(scores, labels, number_questions(steps["prompt"]))


def reference_statistics(reward: RewardModel, rows: Dataset) -> dict[str, Any]:
    """Return statistics over all responses of the first 256 rows, named as in `RewardSettings`.

    They are the mean and standard deviation of the raw reward, the mean length in tokens, and the
    least-squares slope of the reward on the length. If prompts have several responses, both are centred
    within each prompt for the slope.
    """
    sample = rows.select(range(min(REFERENCE_ROWS, len(rows))))
    if "completions" in sample.column_names:
        responses = [
            read_steps(row, reward.settings.encoding.step_separator)[0] for row in sample["completions"]
        ]
        sample = sample.add_column("completion", responses)
    columns = [
        sample[name][:] for name in ("chosen", "rejected", "completion") if name in sample.column_names
    ]
    by_prompt = [list(row) for row in zip(*columns, strict=True)] if columns else sample["responses"][:]
    prompts, responses = _flatten(sample["prompt"], by_prompt)
    scores = np.array(reward.score(prompts, responses, alpha=1.0))
    lengths = np.array(reward.lengths(responses), dtype=float)

    if len(responses) > len(by_prompt):
        groups = np.repeat(range(len(by_prompt)), [len(row) for row in by_prompt])
    else:
        groups = np.zeros(len(responses), int)
    centred_scores, centred_lengths = (
        values - (np.bincount(groups, values) / np.bincount(groups))[groups] for values in (scores, lengths)
    )
    slope = float(centred_scores @ centred_lengths / (centred_lengths @ centred_lengths or 1.0))
    return {
        "reward_mean": float(scores.mean()),
        "reward_std": float(scores.std()) or 1.0,
        "length_mean": float(lengths.mean()),
        "length_slope": slope,
    }


def _flatten(prompts: Any, responses: Any) -> tuple[list[Any], list[Any]]:
    """Return all responses in one list, and the prompt of each."""
    repeated = [prompt for prompt, row in zip(prompts, responses, strict=True) for _ in row]
    return repeated, [response for row in responses for response in row]
