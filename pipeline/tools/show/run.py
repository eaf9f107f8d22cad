"""A run at a glance: the state of each stage, its age, disk and figures, and which artifact was made from which."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.artifacts.build import is_being_written
from pipeline.artifacts.files import read_json
from pipeline.artifacts.inputs import artifact_status
from pipeline.artifacts.manifest import read_manifest, work_folder
from pipeline.config import STAGES
from pipeline.formatting.numbers import format_age, format_number, format_size
from pipeline.formatting.tables import align_columns
from pipeline.tools.show.figures import headlines

HEAD = ["stage", "state", "age", "disk", "artifact", "figures"]


def run_text(folder: Path) -> str:
    """The text for a run's folder."""
    rows, made_from, notes = [HEAD], [["", "made from"]], []
    for stage in STAGES:
        manifest, (found, why) = read_manifest(folder / stage), state(folder / stage)
        figures = ", ".join(
            f"{name} {format_number(value)}" for name, value in headlines(stage, manifest).items()
        )
        cells = [
            format_age(age(folder / stage, manifest)),
            format_size(disk(folder, stage)),
            manifest.get("identity", "")[:8],
        ]
        rows.append([stage, found, *cells, figures])
        made_from += [[stage, ", ".join(input_lines(manifest))]] if manifest else []
        notes += [f"{stage}: {why}"] if why else []
    title = f"{folder}: {format_size(sum(disk(folder, stage) for stage in STAGES))}"
    parts = (title, align_columns(rows, right=(2, 3)), align_columns(made_from), "\n".join(notes))
    return "\n\n".join(filter(None, parts))


def input_lines(manifest: dict[str, Any]) -> list[str]:
    """Each input by its name, the stage or the place it is from, and its identity."""
    own = Path(manifest["fingerprint"]["config"]["runs"], manifest["fingerprint"]["config"]["run"])
    places = {name: Path(each["path"]) for name, each in manifest["inputs"].items()}
    shown = {
        name: path.relative_to(own) if path.is_relative_to(own) else path for name, path in places.items()
    }
    return [
        " ".join(dict.fromkeys([name, str(path), manifest["inputs"][name]["identity"][:8]]))
        for name, path in shown.items()
    ]


def state(folder: Path) -> tuple[str, str]:
    """A word or two, and why. What is published stays in use while it is made again."""
    found, why = artifact_status(folder)
    work = work_folder(folder)
    if not work.exists():
        return found, why
    unfinished = "running" if is_being_written(folder.parent) else "interrupted"
    steps = [
        step for file in work.glob("checkpoint-*/trainer_state.json") if (step := progress(read_json(file)))
    ]
    unfinished += (
        f", {'goes on from' if unfinished == 'interrupted' else 'past'} step {max(steps)}" if steps else ""
    )
    return (
        (unfinished, why)
        if found == "not made"
        else (found, "; ".join(filter(None, [why, f"made again: {unfinished}"])))
    )


def progress(trained: dict[str, Any]) -> int | None:
    """The step that training can go on from, by a checkpoint's state."""
    step = trained.get("global_step")
    return step if step is not None and step < trained["max_steps"] else None


def age(folder: Path, manifest: dict[str, Any]) -> float | None:
    """Seconds since it was published, or last written to."""
    if manifest:
        return time.time() - datetime.fromisoformat(manifest["created_at"]).timestamp()
    times = [found.st_mtime for found in stats(work_folder(folder).parent)]
    return time.time() - max(times) if times else None


def disk(run: Path, stage: str) -> int:
    """The bytes of a stage's files, those of an unfinished one and of its trackers among them."""
    folders = (run / stage, work_folder(run / stage).parent, run / "logs" / stage)
    return sum(found.st_size for folder in folders for found in stats(folder))


def stats(folder: Path) -> Iterator[os.stat_result]:
    """Of each file below; a stage that is running may take one away meanwhile."""
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if not file.is_dir():
                yield file.lstat()
