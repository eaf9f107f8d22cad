"""Build an artifact: reuse it, resume it, or make it; then publish it as a whole.

A stage replaces what `pipeline.artifacts.replacing` lets it replace. One process writes a run at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts.files import (
    finite_or_none,
    hash_files,
    hash_value,
    hold_lock,
    sync_to_disk,
    write_json,
)
from pipeline.artifacts.inputs import find_problem
from pipeline.artifacts.manifest import (
    Artifact,
    describe_input,
    new_manifest,
    package_versions,
    read_fingerprint,
    read_manifest,
    sibling,
    work_folder,
)
from pipeline.artifacts.replacing import (
    BuildConfig,
    Log,
    check_no_link,
    check_partial,
    check_replaceable,
    check_unlisted,
    delete,
    describe_changes,
    discard,
    has_work,
    new_fingerprint,
)
from pipeline.artifacts.schema import content_identity
from pipeline.distributed.processes import is_main_process, on_main_process
from pipeline.errors import UserError


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
    if an artifact or an interrupted run with other settings would be lost. Raises `ValueError` for another
    key in the result of `make`. Errors of `make`, and a full disk, are passed on.
    """
    folder, fingerprint = config.folder, new_fingerprint(config, inputs)
    work = work_folder(folder)
    output = work.parent / "output"

    def begin() -> bool:
        check_no_link(folder.parent)
        stack.enter_context(_locked(folder.parent))
        _repair(folder, kind)
        if _is_reusable(config, kind, fingerprint, log):
            log(f"{config.stage}: unchanged, reusing {folder}")
            return False
        check_replaceable(config, fingerprint, log)
        _prepare_partial(config, output, work, fingerprint, log)
        return True

    def publish() -> None:
        _write_manifest(output, _manifest_values(config, kind, inputs, fingerprint, result))
        _publish(output, folder)

    with ExitStack() as stack:
        if on_main_process(begin):
            result = make(output, work) if is_main_process() or on_every_rank else {}
            on_main_process(publish)
    return folder


def is_being_written(run: Path) -> bool:
    """Return whether a process holds the run's lock."""
    if not (run / ".lock").is_file():
        return False
    try:
        with _locked(run):
            return False
    except UserError:
        return True
    except OSError:  # no permission to write here
        return False


def _locked(run: Path) -> AbstractContextManager[None]:
    busy = f"{run} is being written by another process; wait until it ends, or choose another run: --run NAME"
    return hold_lock(run / ".lock", busy)


def _repair(folder: Path, kind: str) -> None:
    """Finish what a crash in `_publish` left: restore the previous artifact, or delete what it replaced."""
    partial = sibling(folder, "partial")
    old = partial / "old"
    if partial.is_symlink():
        return
    if old.exists() and not folder.exists():
        os.rename(old, folder)

    manifest, fingerprint = read_manifest(folder), read_fingerprint(partial)
    if manifest and manifest["fingerprint"] == fingerprint and not find_problem(folder, manifest, kind):
        discard(partial)  # its result is already published
    elif old.exists():
        delete(old)
    with suppress(OSError):  # it is not there, or not empty
        partial.rmdir()


def _is_reusable(config: BuildConfig, kind: str, fingerprint: dict[str, Any], log: Log) -> bool:
    manifest = read_manifest(config.folder)
    if config.force or manifest.get("fingerprint") != fingerprint:
        return False
    problem = find_problem(config.folder, manifest, kind)
    if problem:
        check_unlisted(config.folder, manifest)
        log(f"{config.stage}: {config.folder}: {problem}; making it again")
    return not problem


def _prepare_partial(
    config: BuildConfig, output: Path, work: Path, fingerprint: dict[str, Any], log: Log
) -> None:
    """Resume the partial folder if it has the same fingerprint, else begin a new one; leave `output` empty.

    Raises `UserError` instead of deleting files that no stage wrote, or work with another fingerprint.
    """
    partial = output.parent
    check_partial(partial, config.force)
    previous = read_fingerprint(partial)
    if config.force or not previous or not has_work(work):
        if has_work(work) and not config.force:
            log(f"{config.stage}: {partial}: fingerprint.json is not valid; starting over")
        discard(partial)
        partial.mkdir()
        write_json(partial / "fingerprint.json", fingerprint)
        work.mkdir(mode=0o700)  # resuming reads pickles, so nobody else may write them
    elif previous == fingerprint:
        log(f"{config.stage}: resuming {partial}")
        delete(output)
    else:
        changes = describe_changes(previous, fingerprint)
        raise UserError(
            f"{partial}: interrupted with other settings: {changes}; set them back to resume, or add --force "
            "to start over"
        )
    output.mkdir()


def _manifest_values(
    config: BuildConfig,
    kind: str,
    inputs: dict[str, Artifact],
    fingerprint: dict[str, Any],
    result: dict[str, Any],
) -> dict[str, Any]:
    """Return the values of the manifest without the files and the identity, which `_write_manifest` adds."""
    if unknown := result.keys() - {"metrics", "rows"}:
        raise ValueError(
            f"{config.stage}: make returned {sorted(unknown)}, expected no key but 'metrics' and 'rows'"
        )
    return {
        "kind": kind,
        "stage": config.stage,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": package_versions(),
        "seed": config.seed,
        "config_hash": hash_value(fingerprint["config"]),
        "fingerprint": fingerprint,
        "inputs": {name: describe_input(artifact) for name, artifact in inputs.items()},
        "rows": result.get("rows", {}),
        "metrics": finite_or_none(result.get("metrics", {})),
    }


def _write_manifest(output: Path, values: dict[str, Any]) -> None:
    """Write config.yaml, and then manifest.json, once every file that it lists is on disk."""
    resolved = yaml.safe_dump(values["fingerprint"]["config"], sort_keys=False, allow_unicode=True)
    (output / "config.yaml").write_text(resolved, encoding="utf-8")
    files = hash_files(output, cached=False)
    sync_to_disk(*output.rglob("*"))

    identity = content_identity(values["kind"], files)
    write_json(output / "manifest.json", new_manifest(values | {"files": files, "identity": identity}))
    sync_to_disk(output / "manifest.json", output)


def _publish(output: Path, folder: Path) -> None:
    """Replace `folder` by `output`; `_repair` recovers from a crash at any point in here."""
    partial = output.parent
    old = partial / "old"
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(output, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    sync_to_disk(folder.parent)
    with suppress(OSError):  # it is published, and the next run finishes the deletion
        discard(partial)
