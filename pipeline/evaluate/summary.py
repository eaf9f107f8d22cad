"""The table that ends a run. Imports no torch."""

import json
from pathlib import Path
from typing import Any


def rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """`name`, `value`, `note` of each headline figure there is."""
    reward, counts = metrics["reward"], metrics.get("rows", {})
    found = []
    if counts:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts["quarantined"].items()))
        found += [_row("rows read", f"{counts['read']:,}"), _row("rows quarantined", f"{sum(counts['quarantined'].values()):,}", reasons)]
    if reward:
        beside = [f"longer wins {reward['accuracy_longer']:.3f}", f"{reward['pairs']:,} test pairs"]
        if "accuracy_ceiling" in reward:
            beside.insert(0, f"ceiling {reward['accuracy_ceiling']:.3f}")
        found.append(_row("reward accuracy", f"{reward['accuracy']:.3f}", ", ".join(beside)))
    policies = [name for name in metrics if name in ("sft", "ppo") or name.startswith("best_of_")]
    for figure, title in (
        ("gold_reward", "gold reward"),
        ("reward", "reward"),
        ("response_tokens", "response tokens"),
        ("well_formed", "well formed"),
    ):
        for name in policies:
            if figure in metrics[name]:
                found.append(
                    _row(f"{title}, {name.replace('_', '-')}", f"{metrics[name][figure]:.{1 if figure == 'response_tokens' else 3}f}")
                )
    ppo = metrics["ppo"]
    for figure, title in (("win_rate_gold", "PPO wins by gold"), ("win_rate", "PPO wins by reward"), ("kl", "KL of PPO to SFT")):
        if figure in ppo:
            found.append(_row(title, f"{ppo[figure]:.3f}", "nats per answer" if figure == "kl" else "against SFT, ties half"))
    return found


def table(folder: Path) -> str:
    """The figures of an evaluate artifact as text, and where its report is."""
    found = rows(json.loads((folder / "metrics.json").read_text()))
    width = max(len(row["name"]) for row in found)
    lines = [f"  {row['name']:<{width}}  {row['value']:>8}  {row['note']}".rstrip() for row in found]
    return "\n".join(["", *lines, "", f"report: {folder / 'report.html'}"])


def _row(name: str, value: str, note: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note}
