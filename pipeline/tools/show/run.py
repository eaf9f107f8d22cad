"""The text of a run: the state, age, size and headline metrics of each stage, and its artifact's inputs."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.artifacts.build import is_being_written
from pipeline.artifacts.files import read_json
from pipeline.artifacts.inputs import artifact_status, published_manifest
from pipeline.artifacts.manifest import work_folder
from pipeline.artifacts.seals import list_checkpoints, sealed_steps
from pipeline.config import STAGES
from pipeline.formatting.numbers import format_age, format_number, format_size
from pipeline.formatting.tables import align_columns
from pipeline.tools.show.headlines import headline_metrics

HEAD = ["stage", "state", "age", "disk", "artifact", "metrics"]


def run_text(folder: Path) -> str:
    """Return the text for a run's folder."""
    rows, inputs, notes = [HEAD], [["", "made from"]], []
    for stage in STAGES:
        manifest, _ = published_manifest(folder / stage)
        state, reason = _state(folder / stage)
        if state == "not made" and _is_skipped(folder, stage):
            state = "skipped"
        metrics = headline_metrics(stage, manifest)
        rows.append(
            [
                stage,
                state,
                format_age(_age(folder / stage, manifest)),
                format_size(_disk_space(folder, stage)),
                manifest.get("identity", "")[:8],
                ", ".join(f"{name} {format_number(value)}" for name, value in metrics.items()),
            ]
        )
        if manifest:
            inputs.append([stage, ", ".join(_describe_inputs(manifest))])
        if reason:
            notes.append(f"{stage}: {reason}")

    title = f"{folder}: {format_size(sum(_disk_space(folder, stage) for stage in STAGES))}"
    parts = (title, align_columns(rows, right=(2, 3)), align_columns(inputs), "\n".join(notes))
    return "\n\n".join(filter(None, parts))


def _describe_inputs(manifest: dict[str, Any]) -> list[str]:
    """Return the name of each input, the stage or path that it comes from, and its identity."""
    lines = []
    for name, place in _input_places(manifest).items():
        words = [name, str(place), manifest["inputs"][name]["identity"][:8]]
        lines.append(" ".join(dict.fromkeys(words)))  # a name that is also the place is printed once
    return lines


def _input_places(manifest: dict[str, Any]) -> dict[str, Path]:
    """Return the path of each input, relative to the run if it is inside."""
    config = manifest["fingerprint"]["config"]
    run = Path(config["runs"], config["run"])
    paths = {name: Path(source["path"]) for name, source in manifest["inputs"].items()}
    return {name: path.relative_to(run) if path.is_relative_to(run) else path for name, path in paths.items()}


def _is_skipped(run: Path, stage: str) -> bool:
    """Return whether later stages were made, and none of them from this one's artifact."""
    later = list(STAGES)[list(STAGES).index(stage) + 1 :]
    manifests = [manifest for name in later if (manifest := published_manifest(run / name)[0])]
    places = [place for manifest in manifests for place in _input_places(manifest).values()]
    return bool(manifests) and not any(place.parts[:1] == (stage,) for place in places)


def _state(folder: Path) -> tuple[str, str]:
    """Return the state of a stage's folder and the reason, "" if there is none.

    A published artifact stays valid while the stage runs again: its state is then the artifact's, and the
    reason includes the unfinished run.
    """
    status, reason = artifact_status(folder)
    work = work_folder(folder)
    if not work.exists():
        return status, reason

    is_running = is_being_written(folder.parent)
    unfinished = "running" if is_running else "interrupted"
    if resumable := _resumable_steps(work):
        unfinished += f", {'past' if is_running else 'resumes from'} step {max(resumable)}"
    if status == "not made":
        return unfinished, reason
    return status, "; ".join(filter(None, [reason, f"made again: {unfinished}"]))


def _resumable_steps(work: Path) -> list[int]:
    """Return the steps from which training can resume; a running stage may delete a checkpoint meanwhile."""
    checkpoints = list_checkpoints(work)
    with suppress(FileNotFoundError):
        sealed = [checkpoints[step] for step in sealed_steps(work) if step in checkpoints]
        steps = [_resume_step(read_json(folder / "trainer_state.json")) for folder in sealed]
        return [step for step in steps if step]
    return []


def _resume_step(trainer_state: dict[str, Any]) -> int | None:
    """Return the step from which training can resume, by the state in a checkpoint; None after the last."""
    step, last = trainer_state.get("global_step"), trainer_state.get("max_steps")
    return step if isinstance(step, int) and isinstance(last, int) and step < last else None


def _age(folder: Path, manifest: dict[str, Any]) -> float | None:
    """Return the seconds since an artifact was published, or since an unfinished one was last written to."""
    if manifest:
        return time.time() - datetime.fromisoformat(manifest["created_at"]).timestamp()
    times = [stat.st_mtime for stat in _stats(work_folder(folder).parent)]
    return time.time() - max(times) if times else None


def _disk_space(run: Path, stage: str) -> int:
    """Return the bytes of a stage's files, including those of an unfinished run and of its trackers."""
    folders = (run / stage, work_folder(run / stage).parent, run / "logs" / stage)
    return sum(stat.st_size for folder in folders for stat in _stats(folder))


def _stats(folder: Path) -> Iterator[os.stat_result]:
    """Yield the stat of each file below; a running stage may delete a file meanwhile."""
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if not file.is_dir():
                yield file.lstat()
