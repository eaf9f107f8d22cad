"""Building an artifact: reuse it, resume it, or make it; then publish it whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml

from pipeline.artifacts.files import (
    hash_files,
    hash_value,
    hold_lock,
    list_files,
    read_json,
    sync_to_disk,
    write_json,
)
from pipeline.artifacts.inputs import find_problem
from pipeline.artifacts.manifest import (
    RESULTS_VERSION,
    SCHEMA,
    Artifact,
    content_identity,
    describe_input,
    flatten_keys,
    package_versions,
    read_manifest,
    sibling,
    work_folder,
)
from pipeline.distributed.processes import is_main_process, on_main_process
from pipeline.errors import UserError


class BuildConfig(Protocol):
    """What `build` needs of a stage's config."""

    stage: ClassVar[str]
    seed: int
    force: bool

    @property
    def folder(self) -> Path: ...
    def resolved(self) -> dict[str, Any]: ...


# Building


def build_artifact(
    config: BuildConfig,
    *,
    kind: str,
    inputs: dict[str, Artifact],
    make: Callable[[Path, Path], dict[str, Any]],
    on_every_rank: bool = False,
    say: Callable[[str], object] = print,
) -> Path:
    """Make and publish `config.folder`, the one way a stage writes; returns that folder.

    `make(output, work)` writes the artifact's files into the empty folder `output`, may keep checkpoints in `work` (there again after an
    interruption, never published) and returns {"metrics": {…}, "rows": {…}}, both optional, plain JSON. It is not called when the published
    artifact has the same fingerprint and is sound, unless `config.force`. If it fails, what was published stays as it was.

    Rank 0 does all of this; the other ranks only call `make`, where it trains (`on_every_rank`), and must leave `output` alone; all return
    when the artifact is there. UserError if another process writes the run, or if what no stage wrote or an interrupted run of other
    settings would be lost; ValueError for another key in make's result; what `make` raises, and a full disk, pass through.
    """
    folder, fingerprint = config.folder, _fingerprint(config, inputs)
    work = work_folder(folder)
    output = work.parent / "output"

    def begin() -> bool:
        held.enter_context(_locked(folder.parent))
        _repair(folder, kind)
        if _is_reusable(config, kind, fingerprint, say):
            say(f"{config.stage}: unchanged, reusing {folder}")
            return False
        _begin(config, output, work, fingerprint, say)
        return True

    def publish() -> None:
        _write_manifest(output, _new_manifest(config, kind, inputs, fingerprint, result))
        _publish(output, folder)

    with ExitStack() as held:
        if on_main_process(begin):
            result = make(output, work) if is_main_process() or on_every_rank else {}
            on_main_process(publish)
    return folder


def _fingerprint(config: BuildConfig, inputs: dict[str, Artifact]) -> dict[str, Any]:
    identities = {name: artifact.identity for name, artifact in inputs.items()}
    made_from = {
        "config": config.resolved(),
        "inputs": identities,
        "version": RESULTS_VERSION if "pipeline" in package_versions() else "not installed",
    }
    return dict(json.loads(json.dumps(made_from, default=str)))  # as it will be read back, to be compared


def is_being_written(run: Path) -> bool:
    """Whether a process holds the run's lock."""
    if not (run / ".lock").exists():
        return False
    try:
        with _locked(run):
            return False
    except UserError:
        return True
    except OSError:  # not ours to write in
        return False


def _locked(run: Path) -> AbstractContextManager[None]:
    busy = f"{run} is being written by another process; wait until it ends, or name another run: --run NAME"
    return hold_lock(run / ".lock", busy)


def _repair(folder: Path, kind: str) -> None:
    """Put right what a crash in the middle of `_swap` left behind."""
    old, partial = sibling(folder, "old"), sibling(folder, "partial")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    manifest = read_manifest(folder)
    if (
        manifest
        and manifest.get("fingerprint") == read_json(partial / "fingerprint.json")
        and not find_problem(folder, manifest, kind)
    ):
        shutil.rmtree(partial, ignore_errors=True)  # what it would become is published


def _is_reusable(
    config: BuildConfig, kind: str, fingerprint: dict[str, Any], say: Callable[[str], object]
) -> bool:
    manifest = read_manifest(config.folder)
    if config.force or manifest.get("fingerprint") != fingerprint:
        return False
    problem = find_problem(config.folder, manifest, kind)
    if problem:
        say(f"{config.stage}: {config.folder}: {problem}; making it again")
    return not problem


def _begin(
    config: BuildConfig, output: Path, work: Path, fingerprint: dict[str, Any], say: Callable[[str], object]
) -> None:
    """Resume the partial folder if it was made from the same, else begin a new one; refuse to lose what is not ours to lose."""
    folder, partial = config.folder, output.parent
    published = list_files(folder).keys()
    half_written = not read_manifest(folder) and "config.yaml" in published
    unknown = (
        [] if half_written else sorted(published - {"manifest.json", *read_manifest(folder).get("files", {})})
    )
    if unknown and not config.force:
        raise UserError(
            f"{folder}: holds what no stage wrote ({', '.join(unknown[:3])}); move it away, or add --force to replace it"
        )
    begun = read_json(partial / "fingerprint.json")
    has_work = bool(begun) and work.is_dir() and any(work.iterdir())
    if config.force or not has_work:
        shutil.rmtree(partial, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(partial / "fingerprint.json", fingerprint)
    elif begun == fingerprint:
        say(f"{config.stage}: resuming {partial}")
        shutil.rmtree(output, ignore_errors=True)
    else:
        changes = _describe_changes(begun, fingerprint)
        raise UserError(
            f"{partial}: interrupted with other settings: {changes}; set them back to resume, or add --force to start afresh"
        )
    output.mkdir()


def _describe_changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    before, after = flatten_keys(old), flatten_keys(new)
    changed = [key for key in sorted(before | after) if before.get(key, ...) != after.get(key, ...)]
    return ", ".join(
        f"{key.removeprefix('config.')} was {before.get(key, 'not set')}, is {after.get(key, 'not set')}"
        for key in changed
    )


def _new_manifest(
    config: BuildConfig,
    kind: str,
    inputs: dict[str, Artifact],
    fingerprint: dict[str, Any],
    result: dict[str, Any],
) -> dict[str, Any]:
    """All of the manifest but the files and the identity, which `_seal` adds."""
    if unknown := result.keys() - {"metrics", "rows"}:
        raise ValueError(
            f"{config.stage}: make returned {sorted(unknown)}, expected no key but 'metrics' and 'rows'"
        )
    return {
        "schema": SCHEMA,
        "kind": kind,
        "stage": config.stage,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "seed": config.seed,
        "config_hash": hash_value(fingerprint["config"]),
        "fingerprint": fingerprint,
        "inputs": {name: describe_input(artifact) for name, artifact in inputs.items()},
        "rows": result.get("rows", {}),
        "metrics": result.get("metrics", {}),
    }


def _write_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Write config.yaml, and manifest.json once everything it vouches for is on disk."""
    resolved = yaml.safe_dump(manifest["fingerprint"]["config"], sort_keys=False, allow_unicode=True)
    (output / "config.yaml").write_text(resolved, encoding="utf-8")
    files = hash_files(output, cached=False)
    sync_to_disk(*output.rglob("*"))
    write_json(
        output / "manifest.json",
        manifest | {"files": files, "identity": content_identity(manifest["kind"], files)},
    )
    sync_to_disk(output / "manifest.json", output)


def _publish(output: Path, folder: Path) -> None:
    """Put `output` in the place of `folder`; a crash anywhere in here is mended by `_repair`."""
    old = sibling(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(output, folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(output.parent, ignore_errors=True)
