"""The table at the top of the report: SFT, best-of-n and PPO, by what matters most."""

from typing import Any

from pipeline.evaluate.summary import shown_best_of
from pipeline.formatting.numbers import format_number
from pipeline.formatting.tables import format_interval

# Metric -> the name of its column, and its decimals.
COLUMNS = {
    "gold_reward": ("Gold reward", 3),
    "scorer_reward": ("Held-out reward", 3),
    "reward": ("Reward", 3),
    "win_rate": ("Wins against SFT", 3),
    "kl": ("KL (nats)", 2),
    "response_tokens": ("Tokens", 1),
}


def policy_table(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return {columns, rows} for the policies of an evaluation's metrics; {} without policies.

    A row has a name and, for each column, a value and its 95 % interval as text. The win rate is that by the
    gold reward if there is one, else by the held-out reward, else by the reward. The KL of best-of-n is an
    upper bound. A column without a value is left out.
    """
    names = [name for name in ("sft", *shown_best_of(metrics), "ppo") if name in metrics]
    sections = {name: _with_common_names(metrics[name]) for name in names}
    columns = [name for name in COLUMNS if any(name in section for section in sections.values())]
    if not columns:
        return {}
    rows = [
        {
            "name": name.replace("_", "-") if name.startswith("best_of") else name.upper(),
            "cells": [_cell(sections[name], column) for column in columns],
        }
        for name in names
    ]
    return {"columns": [COLUMNS[column][0] for column in columns], "rows": rows}


def _with_common_names(section: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics with the most trusted win rate as `win_rate`, and a bound of the KL as `kl`."""
    rate = next((name for name in ("win_rate_gold", "win_rate_scorer") if name in section), "win_rate")
    renamed = {"win_rate": rate, "win_rate_interval": f"{rate}_interval", "kl": "kl_bound"}
    return section | {name: section[other] for name, other in renamed.items() if other in section}


def _cell(section: dict[str, Any], column: str) -> dict[str, str]:
    if column not in section:
        return {"value": "", "interval": ""}
    sign = "≤ " if column == "kl" and "kl_bound" in section else ""
    value = format_number(section[column], f"z.{COLUMNS[column][1]}f")
    return {"value": sign + value, "interval": format_interval(section, column)}
