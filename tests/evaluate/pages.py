"""A report with every section, and a page read back as a browser builds it."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pipeline.evaluate.report import write_report

NAN = float("nan")
HOSTILE = '<script>alert("x")</script> & <b>bold</b>'
FULL: dict[str, Any] = {
    "title": "demo",
    "command": "rlhf run --recipe demo",
    "policies": {
        "columns": ["Gold reward", "KL (nats)"],
        "rows": [
            {
                "name": "SFT",
                "cells": [{"value": "0.120", "interval": "0.100 to 0.140"}, {"value": "", "interval": ""}],
            },
            {
                "name": "best-of-16",
                "cells": [{"value": "0.5", "interval": ""}, {"value": "≤ 1.84", "interval": ""}],
            },
        ],
    },
    "summary": [{"name": "Gold reward, PPO", "value": "0.56", "note": "scale −1 to 1"}],
    "metrics": {"reward": {"comparisons": {"accuracy": 0.8061234, "pairs": 1024}}, "seed": 0},
    "rows": {
        "read": 1240,
        "kept": 1227,
        "merged": 3,
        "quarantined": {"not text": 7, "exact duplicate": 3},
        "by_source": {
            "pairs.csv": {
                "read": 40,
                "kept": 27,
                "merged": 3,
                "quarantined": {"not text": 7, "exact duplicate": 3},
            },
            "more.csv": {"read": 1200, "kept": 1200, "merged": 0, "quarantined": {}},
        },
        "derived": {"prompts": 20},
    },
    "records": {
        "comparisons": {"train": 1000, "validation": 100, "test": 130},
        "prompts": {"train": 16, "validation": 2, "test": 2},
    },
    "curves": {
        "sft": [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.1}],
        "reward": [
            {"step": 10, "loss": 0.7, "accuracy": 0.5},
            {"step": 20, "loss": 0.5},
            {"step": 20, "eval_accuracy": 0.75},
        ],
        "ppo": [
            {"step": 1, "loss": 0.1, "objective/kl": 0.0, "objective/scores": -0.2, "response/tokens": 12.0},
            {"step": 2, "loss": 0.1, "objective/kl": 4.0, "objective/scores": 1.0, "response/tokens": 14.0},
            {"step": 2, "eval_gold_reward": 0.4},
        ],
    },
    "reward_kl": [
        {"name": "SFT", "kl": 0.0, "reward": -0.2, "gold_reward": -0.04, "bound": False},
        {
            "name": "best-of-4",
            "kl": 0.636,
            "reward": 0.3,
            "gold_reward": 0.2,
            "bound": True,
            "line": "best-of-n",
        },
        {
            "name": "best-of-16",
            "kl": 1.835,
            "reward": 0.7,
            "gold_reward": 0.5,
            "bound": True,
            "line": "best-of-n",
        },
    ],
    "rewards": {"sft": [0.1, 0.2, 0.2], "ppo": [0.4, 0.6]},
    "lengths": {"sft": [3, 4, 4, 9], "ppo": [12, 13, 13]},
    "measured": {
        "labels": {
            "rows": 1200,
            "accuracy": 0.75,
            "accuracy_interval": [0.7, 0.8],
            "auroc": 0.8125,
            "confusion": {"bad": {"bad": 1000, "good": 20}, "good": {"bad": 30, "good": 150}},
        },
        "comparisons": {
            "pairs": 40,
            "accuracy": 0.6,
            "accuracy_interval": [0.5, 0.7],
            "accuracy_longer": 0.55,
            "margin": -0.0001,
            "by_source": {
                "web": {
                    "pairs": 30,
                    "accuracy": 0.5,
                    "accuracy_interval": [0.3, 0.7],
                    "accuracy_longer": 0.4,
                },
                "forum": {
                    "pairs": 10,
                    "accuracy": 0.9,
                    "accuracy_interval": [0.8, 1.0],
                    "accuracy_longer": 1.0,
                },
            },
        },
    },
    "calibration": [
        {"confidence": 0.55, "accuracy": 0.5, "count": 90},
        {"confidence": 0.9, "accuracy": 0.8, "count": 10},
    ],
    "samples": [
        {
            "prompt": "a?",
            "sft": "yes",
            "ppo": "no",
            "sft_reward": 0.125,
            "ppo_reward": 2.0,
            "sft_gold": -0.5,
            "ppo_gold": 1.0,
        },
        {
            "prompt": "b?",
            "sft": HOSTILE,
            "ppo": "مرحبا 🎉",
            "sft_reward": NAN,
            "ppo_reward": None,
            "sft_gold": None,
            "ppo_gold": 0.25,
        },
        {"prompt": "c?", "sft": "half a pair: \ud83c"},
    ],
    "lineage": [
        {
            "stage": "prepare",
            "path": "runs/demo/prepare",
            "identity": "a" * 64,
            "created_at": "2024-05-01",
            "inputs": {},
            "config": "seed: 0",
        },
        {
            "stage": "sft",
            "path": "runs/demo/sft",
            "identity": "b" * 64,
            "inputs": {"records": "a" * 64, "model": "f" * 64},
            "config": "seed: 1",
        },
    ],
}
PLOTS = ("curves", "reward_kl", "rewards", "lengths", "calibration")
SECTIONS = [
    "policies",
    "summary",
    "reward_kl",
    "samples",
    "curves",
    "rewards",
    "lengths",
    "measured",
    "calibration",
    "rows",
    "metrics",
    "lineage",
]


class Page(HTMLParser):
    """What a browser builds: every tag with its attributes, and table rows as lists of cells, per section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.section, self.in_cell = html, "", False
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.text: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        elif tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.section = "" if tag == "section" else self.section
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if self.in_cell:
            self.rows[self.section][-1][-1] += data.strip("\n")

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]


def render(folder: Path, data: dict[str, Any]) -> Page:
    write_report(folder / "report.html", data)
    return Page((folder / "report.html").read_text(encoding="utf-8"))
