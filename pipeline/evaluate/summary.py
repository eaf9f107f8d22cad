"""The table that ends a run. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from pipeline.config.evaluate import POLICY_METRICS
from pipeline.formatting.tables import format_interval

# The rows for a reward model that learned from other records than comparisons: row -> metric of its kind.
KIND_ROWS = {
    "rankings": {"reward top-1": "top_1", "Kendall τ": "kendall_tau"},
    "labels": {"reward AUROC": "auroc", "reward F1": "f1"},
    "ratings": {"reward RMSE": "rmse", "Spearman ρ": "spearman"},
    "steps": {"step AUROC": "auroc", "first-error F1": "first_error_f1"},
}
# The rows of each policy: metric -> (title, decimals).
POLICY_ROWS = {
    "gold_reward": ("gold reward", 3),
    "reward": ("reward", 3),
    "response_tokens": ("response tokens", 1),
    "well_formed": ("well formed", 3),
}
# The rows of PPO against SFT: metric -> (title, note).
PPO_ROWS = {
    "win_rate_gold": ("PPO wins by gold", "against SFT, ties half"),
    "win_rate": ("PPO wins by reward", "against SFT, ties half"),
    "kl": ("KL of PPO to SFT", "nats per response"),
}
FEW_PROMPTS = 100  # a metric of fewer is shown with its interval
SHOWN_BEST_OF = "best_of_16"  # shown beside the largest n

Row = dict[str, str]


def summary_rows(metrics: dict[str, Any]) -> list[Row]:
    """Return `name`, `value` and `note` of each headline metric that exists, in the order of the table."""
    return [
        *_data_rows(metrics.get("rows", {})),
        *_reward_rows(metrics["reward"]),
        *_policy_rows(metrics),
        *_ppo_rows(metrics["ppo"]),
    ]


def measure_names(metrics: dict[str, Any]) -> list[str]:
    """Return the metrics of SFT's policy that are of the config's `measures`, or of parts of the reward."""
    sft = metrics["sft"]
    return [name for name in sft if name not in POLICY_METRICS and isinstance(sft[name], int | float)]


def summary_table(folder: Path) -> str:
    """Return the headline metrics of an evaluate artifact as text, and the path of its report."""
    rows = summary_rows(json.loads((folder / "metrics.json").read_text()))
    width = max(len(row["name"]) for row in rows)
    lines = [f"  {row['name']:<{width}}  {row['value']:>8}  {row['note']}".rstrip() for row in rows]
    return "\n".join(["", *lines, "", f"report: {folder / 'report.html'}"])


def _data_rows(counts: dict[str, Any]) -> list[Row]:
    if not counts:
        return []
    quarantined = counts["quarantined"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(quarantined.items()))
    return [
        _row("rows read", f"{counts['read']:,}"),
        *(
            [_row("rows merged", f"{counts['merged']:,}", "votes on one pair or response")]
            if counts.get("merged")
            else []
        ),
        _row("rows quarantined", f"{sum(quarantined.values()):,}", reasons),
    ]


def _reward_rows(reward: dict[str, Any]) -> list[Row]:
    """Return the rows for pairs, and for the kind of records it learned from, which is the first."""
    rows = []
    if pairs := reward.get("comparisons"):
        count = _count_rows(pairs, "accuracy", pairs["pairs"], "test pairs")
        notes = [f"longer wins {pairs['accuracy_longer']:.3f}", count]
        if "accuracy_ceiling" in pairs:
            notes.insert(0, f"ceiling {pairs['accuracy_ceiling']:.3f}")
        rows.append(_row("reward accuracy", f"{pairs['accuracy']:.3f}", ", ".join(notes)))

    kind = next(iter(reward), "comparisons")
    for name, metric in KIND_ROWS.get(kind, {}).items():
        metrics = reward[kind]
        if metric in metrics:
            count = metrics["rankings" if kind == "rankings" else "rows"]
            what = "responses" if kind == "steps" else kind  # each of these records is a response
            note = _count_rows(metrics, metric, count, f"test {what}")
            rows.append(_row(name, f"{metrics[metric]:.3f}", note))
    return rows


def _count_rows(metrics: dict[str, Any], metric: str, count: int, what: str) -> str:
    """Return the number of rows that a metric stands on, that of prompts if it is another, and `_bounds`."""
    prompts = metrics.get("prompts", count)
    note = f"{count:,} {what}" + (f" for {prompts:,} prompts" if prompts != count else "")
    bounds = _bounds(metrics, metric, prompts)
    return f"{note}: {bounds}" if bounds else note


def _bounds(metrics: dict[str, Any], metric: str, prompts: int) -> str:
    """Return the interval of a metric as text if the prompts are few, else an empty string."""
    bounds = format_interval(metrics, metric)
    return f"95 % from {bounds}" if bounds and prompts < FEW_PROMPTS else ""


def _policy_rows(metrics: dict[str, Any]) -> list[Row]:
    measures = {
        name: (name if name.startswith("rewards/") else name.replace("_", " "), 3)
        for name in measure_names(metrics)
    }
    titles = {"gold_reward": POLICY_ROWS["gold_reward"]} | measures | POLICY_ROWS
    return [
        _row(
            f"{title}, {policy.replace('_', '-')}",
            f"{metrics[policy][metric]:.{decimals}f}",
            _bounds(metrics[policy], metric, metrics[policy].get("prompts", FEW_PROMPTS)),
        )
        for metric, (title, decimals) in titles.items()
        for policy in ("sft", *shown_best_of(metrics), "ppo")
        if metric in metrics[policy]
    ]


def shown_best_of(metrics: dict[str, Any]) -> list[str]:
    """Return the sections of best-of-n that are shown beside the policies: n = 16 and the largest n."""
    best_of = [name for name in metrics if name.startswith("best_of_")]  # in the order of n
    return [name for name in best_of if name in (SHOWN_BEST_OF, best_of[-1])]


def _ppo_rows(ppo: dict[str, Any]) -> list[Row]:
    rows = []
    for metric, (title, note) in PPO_ROWS.items():
        if metric in ppo:
            count = ppo.get(f"{metric}_rows")
            if count and ppo.get("prompts", count) < FEW_PROMPTS:
                note = f"{note}, {_count_rows(ppo, metric, count, 'responses')}"
            rows.append(_row(title, f"{ppo[metric]:.3f}", note))
    return rows


def _row(name: str, value: str, note: str = "") -> Row:
    return {"name": name, "value": value, "note": note}
