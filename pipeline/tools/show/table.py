"""The table of several runs: a row of headline metrics for each, and their means over seeds."""

import json
import statistics
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pipeline.artifacts.inputs import artifact_status, published_manifest
from pipeline.config import STAGES
from pipeline.formatting.numbers import format_number
from pipeline.formatting.tables import align_columns
from pipeline.tools.show.diff import settings_of
from pipeline.tools.show.headlines import headline_metrics

Artifacts = dict[str, Path]  # by stage
Metrics = dict[tuple[str, str], float]  # by stage and name


def table_text(folders: Sequence[Path], artifacts: Sequence[Artifacts]) -> str:
    """Return the text for several runs, or artifacts, and the artifacts of each by stage.

    The columns are the headline metrics of the reward stage and of the last stage that a run has.
    """
    manifests = [
        {stage: published_manifest(path)[0] for stage, path in by_stage.items()} for by_stage in artifacts
    ]
    last = max((stage for by_stage in manifests for stage in by_stage), key=list(STAGES).index, default="")
    metrics = [_metrics(by_stage, {"reward", last}) for by_stage in manifests]
    order = list(STAGES)
    columns = sorted(
        dict.fromkeys(column for row in metrics for column in row), key=lambda column: order.index(column[0])
    )

    names, right = list(map(str, folders)), range(1, len(columns) + 2)
    rows = [
        [name, *(format_number(row.get(column)) for column in columns)]
        for name, row in zip(names, metrics, strict=True)
    ]
    parts = [align_columns([*_heads(["run"], columns), *rows], right)]
    means = [
        [
            _glob(names, group),
            str(len(group)),
            *(_mean([metrics[i].get(column) for i in group]) for column in columns),
        ]
        for group in _groups(manifests)
    ]
    if means:
        heads = _heads(["mean ± standard deviation over seeds", "n"], columns)
        parts.append(align_columns([*heads, *means], right))
    return "\n\n".join([*parts, *_notes(artifacts)])


def _metrics(manifests: dict[str, Any], stages: set[str]) -> Metrics:
    return {
        (stage, name): value
        for stage, manifest in manifests.items()
        if stage in stages
        for name, value in headline_metrics(stage, manifest, with_length=True).items()
    }


def _heads(first: list[str], columns: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return two lines: the stages, each named once, and the names of the metrics."""
    stages = [stage for stage, _ in columns]
    named = [stage if stage not in stages[:i] else "" for i, stage in enumerate(stages)]
    return [["", *[""] * (len(first) - 1), *named], [*first, *(name for _, name in columns)]]


def _groups(manifests: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Return the positions of the runs of each group that differs in nothing but the seed.

    A group has two seeds or more. A run with the seeds of an earlier one of its group is left out.
    """
    groups: dict[str, dict[tuple[Any, ...], int]] = {}
    for position, by_stage in enumerate(manifests):
        settings = {stage: settings_of(manifest) for stage, manifest in by_stage.items()}
        seeds = tuple(values.pop("seed") for values in settings.values())
        groups.setdefault(json.dumps(settings, sort_keys=True), {}).setdefault(seeds, position)
    return [list(by_seed.values()) for by_seed in groups.values() if len(by_seed) > 1]


def _glob(names: Sequence[str], group: Sequence[int]) -> str:
    """Return a pattern for the names of a group: what they begin with, and a star."""
    letters = zip(*(names[position] for position in group), strict=False)
    return "".join(letter for letter, *_ in takewhile(lambda column: len(set(column)) == 1, letters)) + "*"


def _mean(values: Sequence[float | None]) -> str:
    """Return the mean and the sample's standard deviation; a dash if a run has no value."""
    numbers = [float(value) for value in values if value is not None]
    if len(numbers) < len(values):
        return format_number(None)
    return f"{format_number(statistics.mean(numbers))} ± {format_number(statistics.stdev(numbers), 'z.2g')}"


def _notes(artifacts: Sequence[Artifacts]) -> list[str]:
    """Return a line for each artifact that is not as published."""
    states = {path: artifact_status(path) for by_stage in artifacts for path in by_stage.values()}
    return [f"{path}: {state}, {reason}" for path, (state, reason) in states.items() if state != "done"]
