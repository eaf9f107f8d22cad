"""What differs between two runs, or two artifacts of one stage: in their settings, what they were made from, and their figures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.inputs import artifact_status
from pipeline.artifacts.manifest import flatten_keys, read_manifest
from pipeline.config import STAGES
from pipeline.errors import UserError
from pipeline.formatting.numbers import format_number
from pipeline.formatting.tables import align_columns
from pipeline.tools.show.figures import headlines

Stages = dict[str, Path]

Manifest = dict[str, Any]


def diff_text(a: Path, b: Path, of_a: Stages, of_b: Stages) -> str:
    """The text for two folders, whose artifacts are given by stage. Raises `UserError` where they cannot be compared."""
    kinds = [
        f"of stage {next(iter(found))}" if folder in found.values() else "a run"
        for folder, found in ((a, of_a), (b, of_b))
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{a} is {kinds[0]}, {b} is {kinds[1]}; expected two runs, or two artifacts of one stage"
        )
    shared = [stage for stage in STAGES if stage in of_a and stage in of_b]
    pairs = {stage: (read_manifest(of_a[stage]), read_manifest(of_b[stage])) for stage in shared}
    set_otherwise, measured = [], []
    for stage, pair in pairs.items():
        found = [metric_lines(stage, manifest, headlines_only=kinds[0] == "a run") for manifest in pair]
        set_otherwise += [
            [f"{stage}.{key}", *map(format_setting, values)] for key, values in unequal(*map(settings, pair))
        ]
        measured += [
            [f"{stage}.{key}", *map(format_setting, values), delta(*values)]
            for key, values in unequal(*found)
        ]
    alone = [
        f"{stage}: only in {a if stage in of_a else b}"
        for stage in STAGES
        if (stage in of_a) != (stage in of_b)
    ]
    conditions = {found[stage]: artifact_status(found[stage]) for found in (of_a, of_b) for stage in shared}
    alone += [f"{folder}: {state}, {why}" for folder, (state, why) in conditions.items() if state != "done"]
    parts = ["\n".join(alone), section(["settings", str(a), str(b)], set_otherwise)]
    parts.append(section(["figures", str(a), str(b), "difference"], measured, right=(1, 2, 3)))
    if kinds[0] == "a run" and measured:
        parts.append(f"every figure of a stage: rlhf show {of_a[shared[-1]]} {of_b[shared[-1]]}")
    return "\n\n".join(filter(None, parts))


def section(head: list[str], rows: Sequence[list[str]], right: Sequence[int] = ()) -> str:
    return align_columns([head, *rows], right) if rows else f"{head[0]}: the same"


def unequal(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, (a.get(key), b.get(key))


def settings(manifest: Manifest) -> dict[str, Any]:
    """By dotted key the config, the versions, and what no stage of ours made; the run's own name and folder always differ."""
    config = manifest["fingerprint"]["config"]
    own, found = (
        f"{config['runs']}/{config['run']}/",
        flatten_keys({key: config[key] for key in config.keys() - {"run", "runs"}}),
    )
    found = {
        key: each.replace(own, "<run>/") if isinstance(each, str) else each
        for key, each in sorted(found.items())
    }
    inputs = {
        f"made from {name}": each["identity"][:8]
        for name, each in manifest["inputs"].items()
        if each.get("foreign")
    }
    return found | inputs | {f"version of {name}": each for name, each in manifest["versions"].items()}


def metric_lines(stage: str, manifest: Manifest, headlines_only: bool) -> dict[str, Any]:
    """By dotted key the counts and metrics, or those that stand for the stage, by name."""
    if headlines_only:
        return headlines(stage, manifest)
    found = flatten_keys(manifest["rows"]) | flatten_keys(manifest["metrics"])
    return {key: each for key, each in found.items() if isinstance(each, int | float)}


def format_setting(found: Any) -> str:
    return "–" if found is None else format_number(found) if isinstance(found, float) else str(found)


def delta(a: Any, b: Any) -> str:
    return "" if None in (a, b) else format_number(b - a, "+z.4g")
