"""Tables for people: the metrics of a reward model, and columns of text. Imports no torch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.errors import as_line
from pipeline.formatting.numbers import format_metric

METRIC_NAMES = {
    "accuracy_longer": "accuracy of “longer wins”",
    "accuracy_ceiling": "accuracy of the gold reward (ceiling)",
    "margin": "mean margin",
    "calibration_error": "expected calibration error",
    "reward_length_correlation": "Spearman ρ with length",
    "kendall_tau": "Kendall τ",
    "top_1": "top-1",
    "auroc": "AUROC",
    "f1": "F1",
    "f1_wrong": "F1 of wrong steps",
    "first_error": "first error found",
    "all_right": "right responses without a false alarm",
    "process_f1": "ProcessBench F1",
    "rmse": "RMSE",
    "spearman": "Spearman ρ",
}


class Table(NamedTuple):
    """A table of text.

    The first column names each row; the others contain its values. The caller must escape the cells.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def metric_tables(metrics: dict[str, Any]) -> list[Table]:
    """Return the metrics of one kind of records as tables.

    The first table contains each metric with its interval. If there are any, a table by source, the best
    responses by aggregate and the confusion matrix follow.
    """
    rows = [
        [METRIC_NAMES.get(name, name.replace("_", " ")), format_metric(value), format_interval(metrics, name)]
        for name, value in metrics.items()
        if isinstance(value, int | float)
    ]
    tables = [Table("Metrics", ("metric", "value", "95 % interval"), rows)]

    if sources := metrics.get("by_source"):
        rows = [[name, *_source_row(source_metrics)] for name, source_metrics in sources.items()]
        head = ("source", "pairs", "accuracy", "95 % interval", "“longer wins”")
        tables.append(Table("By source", head, rows))

    if best := metrics.get("best_of_n"):
        rows = [
            [
                name,
                *(format_metric(result[key]) for key in ("prompts", "accuracy")),
                format_interval(result, "accuracy"),
                format_metric(result["chance"]),
            ]
            for name, result in best.items()
        ]
        head = ("aggregate", "prompts", "best response is right", "95 % interval", "at random")
        tables.append(Table("Best of n", head, rows))

    if confusion := metrics.get("confusion"):
        rows = [[label, *map(format_metric, counts.values())] for label, counts in confusion.items()]
        classes = ("true class", *(f"predicted {name}" for name in confusion))
        tables.append(Table("Confusion matrix", classes, rows))
    return tables


def _source_row(metrics: dict[str, Any]) -> list[str]:
    return [
        format_metric(metrics["pairs"]),
        format_metric(metrics["accuracy"]),
        format_interval(metrics, "accuracy"),
        format_metric(metrics["accuracy_longer"]),
    ]


def format_interval(metrics: dict[str, Any], name: str) -> str:
    """Format the interval of a metric as "low to high", or return an empty string if it has none."""
    return " to ".join(map(format_metric, metrics.get(f"{name}_interval", ())))


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return rows of cells as aligned text; the columns with the numbers in `right` are right-aligned.

    What a terminal would not show as text is left out.
    """
    rows = [[as_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
