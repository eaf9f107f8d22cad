"""Build an artifact: reuse it, resume it, or make it; then publish it as a whole."""

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

Log = Callable[[str], object]


class BuildConfig(Protocol):
    """The part of a stage's config that `build_artifact` reads."""

    stage: ClassVar[str]
    seed: int
    force: bool

    @property
    def folder(self) -> Path:
        """The folder of the artifact."""

    def resolved(self) -> dict[str, Any]:
        """Return everything that decides the result, as plain data."""


def build_artifact(
    config: BuildConfig,
    *,
    kind: str,
    inputs: dict[str, Artifact],
    make: Callable[[Path, Path], dict[str, Any]],
    on_every_rank: bool = False,
    log: Log = print,
) -> Path:
    """Make and publish `config.folder`, and return it. This is the only way in which a stage writes.

    `make(output, work)` writes the artifact's files into the empty folder `output`. It may keep checkpoints
    in `work`, which survives an interruption and is never published. It returns
    {"metrics": {…}, "rows": {…}}, both optional, plain JSON. It is not called if the published artifact is
    intact and has the same fingerprint, unless `config.force` is set. If it fails, the published artifact
    stays as it was.

    Rank 0 does all of this. The other ranks only call `make`, and only with `on_every_rank`; they must not
    write to `output`. All ranks return when the artifact is published.

    Raises `UserError` if another process is writing the run, if files that no stage wrote would be lost, or
    if an interrupted run with other settings would be lost. Raises `ValueError` for another key in the result
    of `make`. Errors of `make`, and a full disk, are passed on.
    """
    folder, fingerprint = config.folder, _fingerprint(config, inputs)
    work = work_folder(folder)
    output = work.parent / "output"

    def begin() -> bool:
        stack.enter_context(_locked(folder.parent))
        _repair(folder, kind)
        if _is_reusable(config, kind, fingerprint, log):
            log(f"{config.stage}: unchanged, reusing {folder}")
            return False
        _prepare_partial(config, output, work, fingerprint, log)
        return True

    def publish() -> None:
        _write_manifest(output, _new_manifest(config, kind, inputs, fingerprint, result))
        _publish(output, folder)

    with ExitStack() as stack:
        if on_main_process(begin):
            result = make(output, work) if is_main_process() or on_every_rank else {}
            on_main_process(publish)
    return folder


def is_being_written(run: Path) -> bool:
    """Return whether a process holds the run's lock."""
    if not (run / ".lock").exists():
        return False
    try:
        with _locked(run):
            return False
    except UserError:
        return True
    except OSError:  # no permission to write here
        return False


def _fingerprint(config: BuildConfig, inputs: dict[str, Artifact]) -> dict[str, Any]:
    fingerprint = {
        "config": config.resolved(),
        "inputs": {name: artifact.identity for name, artifact in inputs.items()},
        "version": RESULTS_VERSION if "pipeline" in package_versions() else "not installed",
    }
    # Through JSON, so that it equals a fingerprint that is read from a file.
    return dict(json.loads(json.dumps(fingerprint, default=str)))


def _locked(run: Path) -> AbstractContextManager[None]:
    busy = f"{run} is being written by another process; wait until it ends, or choose another run: --run NAME"
    return hold_lock(run / ".lock", busy)


def _repair(folder: Path, kind: str) -> None:
    """Clean up after a crash in the middle of `_publish`."""
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
        shutil.rmtree(partial, ignore_errors=True)  # its result is already published


def _is_reusable(config: BuildConfig, kind: str, fingerprint: dict[str, Any], log: Log) -> bool:
    manifest = read_manifest(config.folder)
    if config.force or manifest.get("fingerprint") != fingerprint:
        return False
    problem = find_problem(config.folder, manifest, kind)
    if problem:
        log(f"{config.stage}: {config.folder}: {problem}; making it again")
    return not problem


def _prepare_partial(
    config: BuildConfig, output: Path, work: Path, fingerprint: dict[str, Any], log: Log
) -> None:
    """Resume the partial folder if it has the same fingerprint, else begin a new one; leave `output` empty.

    Raises `UserError` instead of deleting files that no stage wrote, or work with another fingerprint.
    """
    _check_unknown_files(config)
    partial = output.parent
    previous = read_json(partial / "fingerprint.json")
    has_work = bool(previous) and work.is_dir() and any(work.iterdir())
    if config.force or not has_work:
        shutil.rmtree(partial, ignore_errors=True)
        work.mkdir(mode=0o700, parents=True)  # resuming reads pickles, so nobody else may write them
        write_json(partial / "fingerprint.json", fingerprint)
    elif previous == fingerprint:
        log(f"{config.stage}: resuming {partial}")
        shutil.rmtree(output, ignore_errors=True)
    else:
        changes = _describe_changes(previous, fingerprint)
        raise UserError(
            f"{partial}: interrupted with other settings: {changes}; set them back to resume, or add --force "
            "to start over"
        )
    output.mkdir()


def _check_unknown_files(config: BuildConfig) -> None:
    """Raise `UserError` if the published folder contains files that no stage wrote, unless `config.force`."""
    folder = config.folder
    manifest, files = read_manifest(folder), list_files(folder).keys()
    is_half_written = not manifest and "config.yaml" in files
    if config.force or is_half_written:
        return
    unknown = sorted(files - {"manifest.json", *manifest.get("files", {})})
    if unknown:
        raise UserError(
            f"{folder}: contains files that no stage wrote ({', '.join(unknown[:3])}); move them away, or "
            "add --force to replace the folder"
        )


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
    """Return the manifest without the files and the identity, which `_write_manifest` adds."""
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
    """Write config.yaml, and then manifest.json, once every file that it lists is on disk."""
    resolved = yaml.safe_dump(manifest["fingerprint"]["config"], sort_keys=False, allow_unicode=True)
    (output / "config.yaml").write_text(resolved, encoding="utf-8")
    files = hash_files(output, cached=False)
    sync_to_disk(*output.rglob("*"))

    identity = content_identity(manifest["kind"], files)
    write_json(output / "manifest.json", manifest | {"files": files, "identity": identity})
    sync_to_disk(output / "manifest.json", output)


def _publish(output: Path, folder: Path) -> None:
    """Replace `folder` by `output`; `_repair` recovers from a crash at any point in here."""
    old = sibling(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(output, folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(output.parent, ignore_errors=True)
