"""Tables for people: the metrics of a reward model, and columns of text. Imports no torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.formatting.numbers import format_metric

METRIC_NAMES = {
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


def metric_tables(figures: dict[str, Any]) -> list[Table]:
    """The figures of one kind of records with their intervals; by source, and the confusion matrix, where there are such."""
    named = [(name, value) for name, value in figures.items() if isinstance(value, int | float)]
    rows = [
        [METRIC_NAMES.get(name, name.replace("_", " ")), format_metric(value), format_interval(figures, name)]
        for name, value in named
    ]
    found = [Table("Figures", ("figure", "value", "95 % interval"), rows)]
    if sources := figures.get("by_source"):
        head = ("source", "pairs", "accuracy", "95 % interval", "“longer wins”")
        found.append(Table("By source", head, [[name, *_source_row(each)] for name, each in sources.items()]))
    if confusion := figures.get("confusion"):
        rows = [[truth, *map(format_metric, called.values())] for truth, called in confusion.items()]
        found.append(
            Table("Confusion matrix", ("true class", *(f"predicted {name}" for name in confusion)), rows)
        )
    return found


def _source_row(figures: dict[str, Any]) -> list[str]:
    return [
        format_metric(figures["pairs"]),
        format_metric(figures["accuracy"]),
        format_interval(figures, "accuracy"),
        format_metric(figures["accuracy_longer"]),
    ]


def format_interval(figures: dict[str, Any], name: str) -> str:
    return " to ".join(map(format_metric, figures.get(f"{name}_interval", ())))


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Cells in columns, those of `right` at their right edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
