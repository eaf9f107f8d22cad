"""The metrics of an evaluation: of the reward model on held-out records, and of each policy."""

import json
import statistics
from typing import Any

from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage
from pipeline.data.records import open_records
from pipeline.evaluate.sampling import score_samples
from pipeline.evaluate.statistics import (
    best_of_n_means,
    distinct_ngrams,
    fit_curves,
    kl_bound,
    length_correlation,
    win_rate,
)
from pipeline.models.chat import completion_text
from pipeline.reward.evaluation import evaluate_reward_model, held_out_split
from pipeline.reward.functions import RewardFunction
from pipeline.reward.metrics import pair_accuracy
from pipeline.reward.model import RewardModel

TEXTS, RENAMED = ("prompt", "text", "ids"), {"ended": "ended_fraction"}


def reward_metrics(
    reward: RewardModel, inputs: dict[str, Artifact], gold: RewardFunction | None
) -> dict[str, Any]:
    """By kind of records, as the reward stage measured it, or measured now on pairs where the model is foreign; with a gold reward also
    the ceiling: the accuracy of the gold ordering on the same noisy pairs."""
    folder = inputs["records"].path / "comparisons"
    pairs = (
        {"comparisons": held_out_split(open_records(inputs["records"], "comparisons"))}
        if folder.is_dir()
        else {}
    )
    published = inputs["reward"].path / "metrics.json"
    found = json.loads(published.read_text()) if published.is_file() else evaluate_reward_model(reward, pairs)
    if gold is not None and "comparisons" in found and pairs:
        rows = pairs["comparisons"]
        records = rows.remove_columns(["chosen", "rejected"])
        texts = [list(map(completion_text, rows[side])) for side in ("chosen", "rejected")]
        sides = [
            {"text": side, "ids": reward.tokenizer(side)["input_ids"], "ended": [True] * len(side)}
            for side in texts
        ]
        found["comparisons"]["accuracy_ceiling"] = pair_accuracy(
            *(score_samples(gold, side, records) for side in sides)
        )
    return found


def policy_metrics(config: EvaluateStage, sampled: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Sections sft, best_of_2, best_of_4, …, ppo_N of PPO after N steps, and ppo: means over answers; then `fits`. A win rate sets each PPO
    answer against one of SFT's."""
    sft, ppo = sampled["sft"], sampled["ppo"]
    figures = {name: column for name, column in sft.items() if name not in TEXTS}
    metrics: dict[str, Any] = {"sft": mean_metrics(sft)}
    for n in sorted({config.best_of, *(2**k for k in range(1, config.best_of.bit_length()))}):
        found = best_of_n_means(sft["reward"], figures, config.best_of, n)
        found["kl_bound"] = kl_bound(n)
        metrics[f"best_of_{n}"] = {RENAMED.get(name, name): figure for name, figure in found.items()}
    metrics |= {name: mean_metrics(columns) for name, columns in sampled.items() if name.startswith("ppo")}
    for name, columns, samples in (("sft", sft, config.best_of), ("ppo", ppo, config.samples_per_prompt)):
        correlation = length_correlation(columns["reward"], columns["response_tokens"], samples)
        metrics[name] |= {} if correlation is None else {"reward_length_correlation": correlation}
    rivals = [
        i // config.samples_per_prompt * config.best_of + i % config.samples_per_prompt % config.best_of
        for i in range(len(ppo["text"]))
    ]
    of_rivals = lambda name: [sft[name][i] for i in rivals]  # noqa: E731
    for column, name in (
        ("reward", "win_rate"),
        ("gold_reward", "win_rate_gold"),
        ("scorer_reward", "win_rate_scorer"),
    ):
        if column in ppo:
            won = win_rate(
                ppo[column], of_rivals(column), ppo["response_tokens"], of_rivals("response_tokens")
            )
            metrics["ppo"] |= {
                name if key == "rate" else f"{name}_{key}": value for key, value in won.items()
            }
    return metrics | {"fits": fit_curves(frontier_points(metrics))}


def mean_metrics(columns: dict[str, list[Any]]) -> dict[str, float]:
    """Over all answers: each figure, and how varied the answers are."""
    figures = {
        RENAMED.get(name, name): statistics.fmean(map(float, column))
        for name, column in columns.items()
        if name not in TEXTS
    }
    return figures | {f"distinct_{n}": distinct_ngrams(columns["text"], n) for n in (1, 2)}


def frontier_points(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What the frontier's plot shows: SFT, best-of-n for each n, PPO as it went on where it kept its policies, PPO as it is."""
    found = [{"name": "SFT", "kl": 0.0} | metrics["sft"]]
    found += [{"name": n.replace("_", "-"), "kl": of_n["kl_bound"], "bound": True, "line": "best-of-n"} | of_n
              for n, of_n in metrics.items() if n.startswith("best_of_")]  # fmt: skip
    found += [{"name": f"PPO, step {name.removeprefix('ppo_')}", "line": "PPO"} | of_step
              for name, of_step in metrics.items() if name.startswith("ppo_")]  # fmt: skip
    found.append({"name": "PPO"} | metrics["ppo"])
    return [
        {
            key: point.get(key)
            for key in ("name", "kl", "reward", "gold_reward", "scorer_reward", "bound", "line")
        }
        for point in found
    ]
