"""The differences of two runs, or of two artifacts of one stage: settings, external inputs and metrics."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.inputs import artifact_status, published_manifest
from pipeline.artifacts.manifest import flatten_keys
from pipeline.config import STAGES
from pipeline.errors import UserError
from pipeline.formatting.numbers import format_number
from pipeline.formatting.tables import align_columns
from pipeline.tools.show.headlines import headline_metrics

Artifacts = dict[str, Path]  # by stage
Manifest = dict[str, Any]

A_RUN = "a run"


def diff_text(a: Path, b: Path, artifacts_a: Artifacts, artifacts_b: Artifacts) -> str:
    """Return the text for two folders and their artifacts. Raises `UserError` if they cannot be compared."""
    what_a, what_b = _describe(a, artifacts_a), _describe(b, artifacts_b)
    if what_a != what_b:
        raise UserError(f"{a} is {what_a}, {b} is {what_b}; expected two runs, or two artifacts of one stage")

    shared = [stage for stage in STAGES if stage in artifacts_a and stage in artifacts_b]
    setting_rows, metric_rows = [], []
    for stage in shared:
        pair = [published_manifest(artifacts[stage])[0] for artifacts in (artifacts_a, artifacts_b)]
        metrics = [_metrics(stage, manifest, headlines_only=what_a == A_RUN) for manifest in pair]
        for key, values in _differences(*map(settings_of, pair)):
            setting_rows.append([f"{stage}.{key}", *map(_format_value, values)])
        for key, values in _differences(*metrics):
            metric_rows.append([f"{stage}.{key}", *map(_format_value, values), _delta(*values)])

    notes = _notes(a, b, artifacts_a, artifacts_b)
    parts = ["\n".join(notes), _table(["settings", str(a), str(b)], setting_rows)]
    parts.append(_table(["metrics", str(a), str(b), "difference"], metric_rows, right=(1, 2, 3)))
    if what_a == A_RUN and metric_rows:
        stage = shared[-1]
        parts.append(f"all metrics of a stage: rlhf show {artifacts_a[stage]} {artifacts_b[stage]}")
    return "\n\n".join(filter(None, parts))


def _describe(folder: Path, artifacts: Artifacts) -> str:
    return f"of stage {next(iter(artifacts))}" if folder in artifacts.values() else A_RUN


def _notes(a: Path, b: Path, artifacts_a: Artifacts, artifacts_b: Artifacts) -> list[str]:
    """Return a line for each stage that only one run has, and for each artifact that is not as published."""
    notes = [
        f"{stage}: only in {a if stage in artifacts_a else b}"
        for stage in STAGES
        if (stage in artifacts_a) != (stage in artifacts_b)
    ]
    shared = [stage for stage in STAGES if stage in artifacts_a and stage in artifacts_b]
    folders = [artifacts[stage] for artifacts in (artifacts_a, artifacts_b) for stage in shared]
    for folder in dict.fromkeys(folders):
        status, reason = artifact_status(folder)
        if status != "done":
            notes.append(f"{folder}: {status}, {reason}")
    return notes


def _table(head: list[str], rows: Sequence[list[str]], right: Sequence[int] = ()) -> str:
    return align_columns([head, *rows], right) if rows else f"{head[0]}: the same"


def _differences(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, (a.get(key), b.get(key))


def settings_of(manifest: Manifest) -> dict[str, Any]:
    """Return by dotted key the config, the identities of external inputs, and the package versions.

    The run's name and folder always differ: they are left out, and replaced by `<run>` in paths.
    """
    config = manifest["fingerprint"]["config"]
    run = f"{config['runs']}/{config['run']}/"
    flat = flatten_keys({key: config[key] for key in config.keys() - {"run", "runs"}})
    settings = {
        key: value.replace(run, "<run>/") if isinstance(value, str) else value
        for key, value in sorted(flat.items())
    }
    inputs = {
        f"input {name}": source["identity"][:8]
        for name, source in manifest["inputs"].items()
        if source.get("foreign")
    }
    versions = {f"version of {name}": version for name, version in manifest["versions"].items()}
    return settings | inputs | versions


def _metrics(stage: str, manifest: Manifest, headlines_only: bool) -> dict[str, Any]:
    """Return the stage's headline metrics by name, or all its counts and metrics by dotted key."""
    if headlines_only:
        return headline_metrics(stage, manifest)
    metrics = flatten_keys(manifest["rows"]) | flatten_keys(manifest["metrics"])
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def _format_value(value: Any) -> str:
    if value is None:
        return "–"
    return format_number(value) if isinstance(value, float) else str(value)


def _delta(a: Any, b: Any) -> str:
    return "" if None in (a, b) else format_number(b - a, "+z.4g")
