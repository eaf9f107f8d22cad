"""Figures, times and tables as a person reads them."""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.artifact import flatten

# by stage: the manifest's dotted key -> what a line calls it
HEADLINES = {
    "prepare": {"rows.read": "rows read", "rows.kept": "kept"},
    "sft": {"metrics.eval_loss": "loss", "metrics.eval_mean_token_accuracy": "token accuracy"},
    "reward": {
        "metrics.comparisons.accuracy": "accuracy", "metrics.rankings.kendall_tau": "Kendall τ", "metrics.labels.auroc": "AUROC",
        "metrics.ratings.spearman": "Spearman ρ",
    },
    "ppo": {"metrics.eval_gold_reward": "gold reward", "metrics.eval_reward": "reward", "metrics.eval_kl": "KL"},
    "evaluate": {
        "metrics.ppo.gold_reward": "gold reward", "metrics.ppo.reward": "reward", "metrics.ppo.win_rate_gold": "wins by gold",
        "metrics.ppo.win_rate": "wins by reward", "metrics.ppo.kl": "KL",
    },
}  # fmt: skip


def headlines(stage: str, manifest: dict[str, Any]) -> dict[str, float]:
    """The figures that stand for a stage, by name."""
    found = flatten({key: manifest.get(key, {}) for key in ("rows", "metrics")})
    return {name: found[key] for key, name in HEADLINES[stage].items() if isinstance(found.get(key), int | float)}


def number(value: Any, sign: str = "") -> str:
    return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.4g}"


def age(seconds: float | None) -> str:
    """In the largest unit of which there are two."""
    if seconds is None:
        return ""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return "now"


def size(count: float) -> str:
    """Of bytes, in powers of 1000."""
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(int(math.log10(count)) // 3, 4) if count >= 1 else 0
    return f"{count / 1000**power:.{1 if power else 0}f} {units[power]}"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Cells in columns, those of `right` at their right edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)
