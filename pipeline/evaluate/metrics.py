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
from pipeline.evaluate.summary import measure_names
from pipeline.models.chat import response_text
from pipeline.reward.evaluation import evaluate_reward_model, held_out_split
from pipeline.reward.functions import RewardFunction
from pipeline.reward.metrics import pair_accuracy
from pipeline.reward.model import RewardModel

TEXT_COLUMNS = ("prompt", "text", "ids")  # the columns of samples that have no mean
METRIC_NAMES = {"ended": "ended_fraction"}  # column -> its metric, if the names differ
WIN_RATES = {"reward": "win_rate", "gold_reward": "win_rate_gold", "scorer_reward": "win_rate_scorer"}
POINT_KEYS = ("name", "kl", "reward", "gold_reward", "scorer_reward", "bound", "line")


def reward_metrics(
    reward: RewardModel, inputs: dict[str, Artifact], gold: RewardFunction | None
) -> dict[str, Any]:
    """Return the reward model's metrics by kind of records.

    They are those of the reward stage. An external model has none, and is evaluated on the held-out pairs.
    With a gold reward, the comparisons get `accuracy_ceiling`: the accuracy of the gold ordering on the
    same noisy pairs.
    """
    folder = inputs["records"].path / "comparisons"
    pairs = (
        {"comparisons": held_out_split(open_records(inputs["records"], "comparisons"))}
        if folder.is_dir()
        else {}
    )

    published = inputs["reward"].path / "metrics.json"
    if published.is_file():
        metrics = json.loads(published.read_text())
    else:
        metrics = evaluate_reward_model(reward, pairs)

    if gold is not None and "comparisons" in metrics and pairs:
        metrics["comparisons"]["accuracy_ceiling"] = _accuracy_ceiling(reward, gold, pairs["comparisons"])
    return metrics


def _accuracy_ceiling(reward: RewardModel, gold: RewardFunction, pairs: Any) -> float:
    records = pairs.remove_columns(["chosen", "rejected"])
    texts = [list(map(response_text, pairs[side])) for side in ("chosen", "rejected")]
    sides = [
        {"text": side, "ids": reward.tokenizer(side)["input_ids"], "ended": [True] * len(side)}
        for side in texts
    ]
    return pair_accuracy(*(score_samples(gold, side, records) for side in sides))


def policy_metrics(config: EvaluateStage, samples: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Return the metrics of each policy, and the `fits` of `fit_curves`.

    The sections are sft, best_of_2, best_of_4, …, ppo_N (PPO after N steps) and ppo; each contains means
    over responses.
    """
    sft, ppo = samples["sft"], samples["ppo"]
    metrics: dict[str, Any] = {"sft": mean_metrics(sft)}
    columns = {name: column for name, column in sft.items() if name not in TEXT_COLUMNS}
    for n in sorted({config.best_of, *(2**k for k in range(1, config.best_of.bit_length()))}):
        means = best_of_n_means(sft["reward"], columns, config.best_of, n)
        means["kl_bound"] = kl_bound(n)
        metrics[f"best_of_{n}"] = {METRIC_NAMES.get(name, name): mean for name, mean in means.items()}
    metrics |= {name: mean_metrics(columns) for name, columns in samples.items() if name.startswith("ppo")}

    for name, per_prompt in (("sft", config.best_of), ("ppo", config.samples_per_prompt)):
        rewards, lengths = samples[name]["reward"], samples[name]["response_tokens"]
        correlation = length_correlation(rewards, lengths, per_prompt)
        if correlation is not None:
            metrics[name]["reward_length_correlation"] = correlation
    metrics["ppo"] |= _win_rates(config, sft, ppo)
    return metrics | {"fits": fit_curves(reward_kl_points(metrics))}


def _win_rates(config: EvaluateStage, sft: dict[str, list[Any]], ppo: dict[str, list[Any]]) -> dict[str, Any]:
    """Return PPO's win rates by each reward, against SFT's responses to the same prompts."""
    rivals = [
        i // config.samples_per_prompt * config.best_of + i % config.samples_per_prompt % config.best_of
        for i in range(len(ppo["text"]))
    ]
    rival_lengths = [sft["response_tokens"][i] for i in rivals]
    metrics: dict[str, Any] = {}
    for column, name in WIN_RATES.items():
        if column in ppo:
            rival_scores = [sft[column][i] for i in rivals]
            rates = win_rate(ppo[column], rival_scores, ppo["response_tokens"], rival_lengths)
            metrics |= {name if key == "rate" else f"{name}_{key}": value for key, value in rates.items()}
    return metrics


def mean_metrics(columns: dict[str, list[Any]]) -> dict[str, float]:
    """Return the mean of each column over all responses, and how varied the responses are."""
    means = {
        METRIC_NAMES.get(name, name): statistics.fmean(map(float, column))
        for name, column in columns.items()
        if name not in TEXT_COLUMNS
    }
    return means | {f"distinct_{n}": distinct_ngrams(columns["text"], n) for n in (1, 2)}


def reward_kl_points(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the points of the reward-KL curves, each with `POINT_KEYS` and the config's measures.

    They are SFT, best-of-n for each n, the intermediate policies that PPO kept, and PPO's final policy.
    """
    points = [{"name": "SFT", "kl": 0.0} | metrics["sft"]]
    for name, section in metrics.items():
        if name.startswith("best_of_"):
            label = {"name": name.replace("_", "-"), "line": "best-of-n"}
            points.append(label | {"kl": section["kl_bound"], "bound": True} | section)
    for name, section in metrics.items():
        if name.startswith("ppo_"):
            points.append({"name": f"PPO, step {name.removeprefix('ppo_')}", "line": "PPO"} | section)
    points.append({"name": "PPO"} | metrics["ppo"])
    keys = (*POINT_KEYS, *measure_names(metrics))
    return [{key: point.get(key) for key in keys} for point in points]
