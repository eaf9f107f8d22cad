"""The headline metrics of each stage."""

from typing import Any

from pipeline.artifacts.manifest import flatten_keys
from pipeline.config.evaluate import INTERVAL

# By stage: the dotted key in the manifest -> its name in a line of text.
HEADLINES = {
    "prepare": {
        "rows.read": "rows read",
        "rows.kept": "kept",
    },
    "sft": {
        "metrics.eval_loss": "loss",
        "metrics.eval_mean_token_accuracy": "token accuracy",
    },
    "reward": {
        "metrics.comparisons.accuracy": "accuracy",
        "metrics.rankings.kendall_tau": "Kendall τ",
        "metrics.labels.auroc": "AUROC",
        "metrics.ratings.spearman": "Spearman ρ",
        "metrics.steps.auroc": "AUROC of steps",
        "metrics.steps.first_error_f1": "ProcessBench F1",
    },
    "ppo": {
        "metrics.eval_gold_reward": "gold reward",
        "metrics.eval_reward": "reward",
        "metrics.eval_kl": "KL",
    },
    "evaluate": {
        "metrics.ppo.gold_reward": "gold reward",
        "metrics.ppo.reward": "reward",
        "metrics.ppo.win_rate_gold": "wins by gold",
        "metrics.ppo.win_rate": "wins by reward",
        "metrics.ppo.kl": "KL",
    },
}

# As above, for a table of runs alone.
LENGTHS = {
    "ppo": {"metrics.eval_response_tokens": "tokens"},
    "evaluate": {"metrics.ppo.response_tokens": "tokens"},
}

# Each of several rewards has its own name behind such a key.
PARTS = {"ppo": "metrics.eval_rewards/", "evaluate": "metrics.ppo.rewards/"}


def headline_metrics(stage: str, manifest: dict[str, Any], with_length: bool = False) -> dict[str, float]:
    """Return by name the headline metrics that the manifest of a stage contains.

    `with_length` adds the mean length of the responses in tokens.
    """
    names = HEADLINES[stage] | (LENGTHS.get(stage, {}) if with_length else {})
    metrics = flatten_keys({key: manifest.get(key, {}) for key in ("rows", "metrics")})
    if prefix := PARTS.get(stage):
        keys = [key for key in metrics if key.startswith(prefix) and INTERVAL not in key]
        names |= {key: key.removeprefix(prefix) for key in keys}
    return {name: metrics[key] for key, name in names.items() if isinstance(metrics.get(key), int | float)}
