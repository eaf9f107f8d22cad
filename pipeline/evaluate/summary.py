"""The table that ends a run. Imports no torch."""

import json
from pathlib import Path
from typing import Any

# What is said of a reward model that learned from other records than comparisons: row -> figure of its kind.
KIND_ROWS = {
    "rankings": {"reward top-1": "top_1", "Kendall τ": "kendall_tau"},
    "labels": {"reward AUROC": "auroc", "reward F1": "f1"},
    "ratings": {"reward RMSE": "rmse", "Spearman ρ": "spearman"},
}


def summary_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """`name`, `value`, `note` of each headline figure there is."""
    reward, counts = metrics["reward"], metrics.get("rows", {})
    found = []
    if counts:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts["quarantined"].items()))
        found += [
            _row("rows read", f"{counts['read']:,}"),
            _row("rows quarantined", f"{sum(counts['quarantined'].values()):,}", reasons),
        ]
    found += _reward_rows(reward)
    sampled = [name for name in metrics if name.startswith("best_of_")]  # they come by n
    told = [name for name in sampled if name in ("best_of_16", sampled[-1])]
    policies = {name.replace("_", "-"): metrics[name] for name in ("sft", *told, "ppo")}
    for figure, title in (
        ("gold_reward", "gold reward"),
        ("reward", "reward"),
        ("response_tokens", "response tokens"),
        ("well_formed", "well formed"),
    ):
        decimals = 1 if figure == "response_tokens" else 3
        found += [
            _row(f"{title}, {name}", f"{figures[figure]:.{decimals}f}")
            for name, figures in policies.items()
            if figure in figures
        ]
    ppo = metrics["ppo"]
    for figure, title in (
        ("win_rate_gold", "PPO wins by gold"),
        ("win_rate", "PPO wins by reward"),
        ("kl", "KL of PPO to SFT"),
    ):
        if figure in ppo:
            found.append(
                _row(
                    title,
                    f"{ppo[figure]:.3f}",
                    "nats per answer" if figure == "kl" else "against SFT, ties half",
                )
            )
    return found


def summary_table(folder: Path) -> str:
    """The figures of an evaluate artifact as text, and where its report is."""
    found = summary_rows(json.loads((folder / "metrics.json").read_text()))
    width = max(len(row["name"]) for row in found)
    lines = [f"  {row['name']:<{width}}  {row['value']:>8}  {row['note']}".rstrip() for row in found]
    return "\n".join(["", *lines, "", f"report: {folder / 'report.html'}"])


def _reward_rows(reward: dict[str, Any]) -> list[dict[str, str]]:
    """Of pairs and of the kind it learned from, which comes first."""
    found = []
    if pairs := reward.get("comparisons"):
        beside = [f"longer wins {pairs['accuracy_longer']:.3f}", f"{pairs['pairs']:,} test pairs"]
        if "accuracy_ceiling" in pairs:
            beside.insert(0, f"ceiling {pairs['accuracy_ceiling']:.3f}")
        found.append(_row("reward accuracy", f"{pairs['accuracy']:.3f}", ", ".join(beside)))
    kind = next(iter(reward), "comparisons")
    for name, figure in KIND_ROWS.get(kind, {}).items():
        figures = reward[kind]
        if figure in figures:
            count = figures["rankings" if kind == "rankings" else "rows"]
            found.append(_row(name, f"{figures[figure]:.3f}", f"{count:,} test {kind}"))
    return found


def _row(name: str, value: str, note: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note}
