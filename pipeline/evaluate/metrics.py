"""The metrics of an evaluation: of the reward model on held-out records, and of each policy."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage
from pipeline.data.identity import canonical_text, number_questions
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
from pipeline.reward import weighted
from pipeline.reward.evaluation import evaluate_reward_model, held_out_split
from pipeline.reward.functions import RewardFunction
from pipeline.reward.intervals import Numbers, bootstrap_interval
from pipeline.reward.metrics import measure_mean, wins
from pipeline.reward.model import RewardModel

TEXT_COLUMNS = ("prompt", "text", "ids")  # the columns of samples that have no mean
METRIC_NAMES = {"ended": "ended_fraction"}  # column -> its metric, if the names differ
WIN_RATES = {"reward": "win_rate", "gold_reward": "win_rate_gold", "scorer_reward": "win_rate_scorer"}
NOT_SCORES = (*TEXT_COLUMNS, "response_tokens", "ended", "kl")  # the columns whose means have no interval
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
        prompts = held_out_split(open_records(inputs["records"], "prompts"))
        metrics["comparisons"] |= _accuracy_ceiling(reward, gold, pairs["comparisons"], prompts)
    return metrics


def _accuracy_ceiling(reward: RewardModel, gold: RewardFunction, pairs: Any, prompts: Any) -> dict[str, Any]:
    """Return how often the gold reward orders the pairs as they are.

    It gets the columns of the prompts' own records, such as an answer; if one has none, those of the pairs.
    """
    places = {canonical_text(prompt): place for place, prompt in enumerate(prompts["prompt"])}
    rows = [places.get(canonical_text(prompt)) for prompt in pairs["prompt"]]
    records = pairs.remove_columns(["chosen", "rejected"]) if None in rows else prompts.select(rows)
    texts = [list(map(response_text, pairs[side])) for side in ("chosen", "rejected")]
    sides = [
        {"text": side, "ids": reward.tokenizer(side)["input_ids"], "ended": [True] * len(side)}
        for side in texts
    ]
    won = wins(*(score_samples(gold, side, records) for side in sides))
    return measure_mean("accuracy_ceiling", won, number_questions(pairs["prompt"]))


def policy_metrics(config: EvaluateStage, samples: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Return the metrics of each policy, and the `fits` of `fit_curves`.

    The sections are sft, best_of_2, best_of_4, …, ppo_N (PPO after N steps) and ppo; each contains means
    over responses. Those of scores have an interval, which is over `prompts`.
    """
    sft, ppo = samples["sft"], samples["ppo"]
    metrics: dict[str, Any] = {"sft": mean_metrics(sft)}
    columns = {name: column for name, column in sft.items() if name not in TEXT_COLUMNS}
    for n in sorted({config.best_of, *(2**k for k in range(1, config.best_of.bit_length()))}):
        picked = best_of_n_means(sft["reward"], columns, config.best_of, n)
        means = {METRIC_NAMES.get(name, name): float(by_prompt.mean()) for name, by_prompt in picked.items()}
        means |= {"kl_bound": kl_bound(n)} | _intervals(picked, columns, sft["prompt"][:: config.best_of])
        metrics[f"best_of_{n}"] = means
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
    groups = number_questions(ppo["prompt"])
    metrics: dict[str, Any] = {}
    for column, name in WIN_RATES.items():
        if column in ppo:
            rival_scores = [sft[column][i] for i in rivals]
            rates = win_rate(ppo[column], rival_scores, ppo["response_tokens"], rival_lengths, groups)
            metrics |= {name if key == "rate" else f"{name}_{key}": value for key, value in rates.items()}
    return metrics


def mean_metrics(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the mean of each column over all responses, its interval, and how varied the responses are."""
    means = {
        METRIC_NAMES.get(name, name): statistics.fmean(map(float, column))
        for name, column in columns.items()
        if name not in TEXT_COLUMNS
    }
    means |= {f"distinct_{n}": distinct_ngrams(columns["text"], n) for n in (1, 2)}
    return means | _intervals(columns, columns, columns["prompt"])


def _intervals(
    rows: Mapping[str, Numbers], columns: Mapping[str, list[Any]], prompts: Sequence[Any]
) -> dict[str, Any]:
    """Return the number of prompts, and for each score the interval of its mean over `rows`.

    `prompts` are those of the rows. A score that is 0 or 1 in all of its column is a share.
    """
    groups, intervals = number_questions(prompts), {}
    for name, values in rows.items():
        if name not in NOT_SCORES:
            limits = (0.0, 1.0) if set(columns[name]) <= {0, 1} else (None, None)
            if bounds := bootstrap_interval(weighted.mean, [values], groups, *limits):
                intervals[f"{name}_interval"] = bounds
    return {"prompts": len(set(groups)), **intervals}


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
