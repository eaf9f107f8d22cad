"""The kinds of records: their columns, responses, and the targets of the objectives. Imports no torch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]
Text = str | Sequence[dict[str, Any]]  # a string, or messages

SPLITS = ("train", "validation", "test")

# Columns that contain one text, and the role of its speaker.
ROLES = {
    "prompt": "user",
    "completion": "assistant",
    "chosen": "assistant",
    "rejected": "assistant",
    "response": "assistant",
}


class RecordKind(NamedTuple):
    """The columns of a kind, the K responses of a record, and the target that an objective learns for them.

    A target is K ranks (1 is best), the index of a class, a rating, or 1 for each right step and 0 for each
    wrong one. A kind without `responses` trains no reward model. `prompt_may_be_empty` is set for texts that
    respond to nothing. `keeps_columns` is set if a record also has the other columns of its row, which reward
    functions get.
    """

    columns: tuple[str, ...]
    responses: Callable[[Record], list[Text]] | None = None
    target: Callable[[Record], Any] | None = None
    optional: tuple[str, ...] = ()
    prompt_may_be_empty: bool = False
    keeps_columns: bool = False


KINDS = {
    "demonstrations": RecordKind(("prompt", "completion")),
    "comparisons": RecordKind(
        ("prompt", "chosen", "rejected"),
        responses=lambda record: [record["chosen"], record["rejected"]],
        target=lambda record: [1, 1] if is_tie(record) else [1, 2],
        optional=("margin", "source", "preference", "votes"),
    ),
    "rankings": RecordKind(
        ("prompt", "responses", "ranks"),
        responses=lambda record: record["responses"],
        target=lambda record: record["ranks"],
    ),
    "labels": RecordKind(
        ("prompt", "completion", "label"),
        responses=lambda record: [record["completion"]],
        target=lambda record: record["label"],
        optional=("label_shares", "votes"),
        prompt_may_be_empty=True,
    ),
    "ratings": RecordKind(
        ("prompt", "completion", "rating"),
        responses=lambda record: [record["completion"]],
        target=lambda record: record["rating"],
        optional=("votes",),
    ),
    # A record is one response, cut into steps. Its `responses` are the steps, and `labels` judges each.
    "steps": RecordKind(
        ("prompt", "completions", "labels"),
        responses=lambda record: record["completions"],
        target=lambda record: [int(label) for label in record["labels"]],
        optional=("answer",),
    ),
    "prompts": RecordKind(("prompt",), keeps_columns=True),
    # Rows of a file that `rlhf score` reads; no stage learns from them.
    "answers": RecordKind(("prompt", "response"), prompt_may_be_empty=True),
    "step_answers": RecordKind(("prompt", "completions"), prompt_may_be_empty=True),
}
LEARNABLE = tuple(name for name, kind in KINDS.items() if kind.responses is not None)


MERGED = "merged"  # the reason of a row whose record is part of that of another row


def is_tie(record: Record) -> bool:
    """Return whether neither response of a comparison is preferred."""
    return record.get("preference") == 0.5


def shares_of(record: Record, classes: int) -> list[float]:
    """Return the share of each class in the votes on a labelled response; all are for `label` by default."""
    return record.get("label_shares") or [float(index == record["label"]) for index in range(classes)]


class RowError(Exception):
    """The reason why a row is not kept: `reason` is counted, `detail` explains it in quarantine.jsonl."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class RawRow(NamedTuple):
    """A row as read.

    `source` is a file, a hub id or `demo`.
    `line` is 1-based; it is the number of the row if the source has no lines.
    `splits` are those that the row may go to: fewer if the names of files say so.
    """

    source: str
    line: int
    data: Any
    fault: RowError | None = None
    splits: tuple[str, ...] = SPLITS


def location(rows: Sequence[RawRow]) -> str:
    """Return the source and line of the first row."""
    return f"{rows[0].source}:{rows[0].line}"
