"""The figures of metrics.json as tables for people: one source for the model card and for the report. Imports no torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

NAMES = {
    "accuracy_longer": "accuracy of “longer wins”", "accuracy_ceiling": "accuracy of the gold reward (ceiling)",
    "margin": "mean margin", "calibration_error": "expected calibration error",
    "reward_length_correlation": "Spearman ρ with length",
    "kendall_tau": "Kendall τ", "top_1": "top-1", "auroc": "AUROC", "f1": "F1", "rmse": "RMSE", "spearman": "Spearman ρ",
}  # fmt: skip


class Table(NamedTuple):
    """The first column names each row; the others hold what is told of it. Cells are text, to be escaped by who writes them."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def of_kind(figures: dict[str, Any]) -> list[Table]:
    """The figures of one kind of records with their intervals; by source, and the confusion matrix, where there are such."""
    named = [(name, value) for name, value in figures.items() if isinstance(value, int | float)]
    rows = [[NAMES.get(name, name.replace("_", " ")), shown(value), interval(figures, name)] for name, value in named]
    found = [Table("Figures", ("figure", "value", "95 % interval"), rows)]
    if sources := figures.get("by_source"):
        head = ("source", "pairs", "accuracy", "95 % interval", "“longer wins”")
        found.append(Table("By source", head, [[name, *by_source(each)] for name, each in sources.items()]))
    if confusion := figures.get("confusion"):
        rows = [[truth, *map(shown, called.values())] for truth, called in confusion.items()]
        found.append(Table("Confusion matrix", ("true class", *(f"predicted {name}" for name in confusion)), rows))
    return found


def by_source(figures: dict[str, Any]) -> list[str]:
    return [shown(figures["pairs"]), shown(figures["accuracy"]), interval(figures, "accuracy"), shown(figures["accuracy_longer"])]


def interval(figures: dict[str, Any], name: str) -> str:
    return " to ".join(map(shown, figures.get(f"{name}_interval", ())))


def shown(value: float) -> str:
    """A count in full, another number to three places, a dash for none."""
    return "–" if value != value else f"{value:,}" if isinstance(value, int) else f"{value:z.3f}"
