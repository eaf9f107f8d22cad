"""What a stage may replace or delete, and what it refuses to.

Without `--force` it replaces the artifact that it made with the same settings, if an input has changed since
or if the artifact was altered, and the remains of a run that kept no checkpoint. Whatever else is in the way
stays, and one line says so: an artifact of other settings, a file that no stage wrote (hidden files are the
user's), a temporary name that somebody else made first. A symbolic link is refused even with `--force`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml

from pipeline.artifacts.files import is_hidden
from pipeline.artifacts.inputs import HALF_WRITTEN, find_unlisted
from pipeline.artifacts.manifest import (
    RESULTS_VERSION,
    Artifact,
    flatten_keys,
    load_manifest,
    package_versions,
    read_fingerprint,
    work_folder,
)
from pipeline.artifacts.schema import NEWER
from pipeline.distributed.processes import on_main_process
from pipeline.errors import UserError

Log = Callable[[str], object]

PARTIAL_NAMES = {"fingerprint.json", "output", "work", "old"}


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


def check_settings(configs: Sequence[BuildConfig]) -> None:
    """Check that no stage would replace an artifact of other settings, before the first of them is run.

    Only settings are compared: which inputs a stage will have is not known yet. Raises `UserError`.
    """

    def check() -> None:
        for config in configs:
            new = new_fingerprint(config, {})
            if not config.force and not _can_resume(config, new["config"]):
                _check_changes(config, new, but="revision")  # a stage sets it to the commit

    on_main_process(check)


def new_fingerprint(config: BuildConfig, inputs: dict[str, Artifact]) -> dict[str, Any]:
    """Return the fingerprint of what the config makes from the inputs."""
    fingerprint = {
        "config": config.resolved(),
        "inputs": {name: artifact.identity for name, artifact in inputs.items()},
        "version": RESULTS_VERSION if "pipeline" in package_versions() else "not installed",
    }
    # Through JSON, so that it equals a fingerprint that is read from a file.
    return dict(json.loads(json.dumps(fingerprint, default=str)))


def check_replaceable(config: BuildConfig, fingerprint: dict[str, Any], log: Log) -> None:
    """Check that nothing is lost if the published folder is replaced, and log why it is made again.

    Raises `UserError` if it is an artifact of other settings or has files that no stage wrote, unless
    `config.force` is set; and if it is a symbolic link.
    """
    folder = config.folder
    check_no_link(folder)
    if config.force:
        return
    if not _can_resume(config, fingerprint["config"]):
        _check_changes(config, fingerprint)

    manifest, fault = load_manifest(folder)
    check_unlisted(folder, manifest)
    if not manifest and (folder / "config.yaml").exists():
        log(f"{config.stage}: {folder}: {fault or HALF_WRITTEN}; making it again")
    elif manifest and (changes := describe_changes(manifest["fingerprint"], fingerprint)):
        log(f"{config.stage}: {folder}: {changes}; making it again")


def _can_resume(config: BuildConfig, settings: dict[str, Any]) -> bool:
    """Return whether a run with the same settings was begun, which the user agreed to then."""
    work = work_folder(config.folder)
    return has_work(work) and read_fingerprint(work.parent).get("config") == settings


def _check_changes(config: BuildConfig, new: dict[str, Any], but: str | None = None) -> None:
    """Raise `UserError` if the folder was published with other settings, or by other code.

    `but` is the last part of keys that are not compared.
    """
    folder = config.folder
    manifest, fault = load_manifest(folder)
    if fault and fault.startswith(NEWER):
        raise UserError(f"{folder}: {fault} with --force")
    old = manifest["fingerprint"] if manifest else {"config": _read_config(folder), "version": new["version"]}
    if not old["config"]:
        return

    reasons = []
    if changes := describe_changes(old["config"], new["config"], but):
        reasons.append(f"was made with other settings: {changes}")
    if old["version"] != new["version"]:
        reasons.append(
            f"has the results of version {old['version']}, and version {new['version']} computes others"
        )
    if reasons:
        raise UserError(
            f"{folder}: {'; it '.join(reasons)}; add --force to replace it, or keep it and choose another "
            "run: --run NAME"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """Return config.yaml of a folder that has no manifest, or {} if it cannot be understood."""
    with suppress(FileNotFoundError, NotADirectoryError, yaml.YAMLError, ValueError, RecursionError):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    return {}


def check_unlisted(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise `UserError` if a published folder contains files that no stage wrote.

    Which files of a half-written folder are the user's is not known, except for hidden ones.
    """
    is_file = folder.exists() and not folder.is_dir()
    unknown = [folder.name] if is_file else find_unlisted(folder, manifest)
    if not manifest and "config.yaml" in unknown:
        unknown = [name for name in unknown if is_hidden(name)]
    if unknown:
        raise UserError(
            f"{folder}: contains files that no stage wrote ({', '.join(unknown[:3])}); move them away, or "
            "add --force to replace the folder"
        )


def check_no_link(folder: Path) -> None:
    """Raise `UserError` if a folder is a symbolic link."""
    if folder.is_symlink():
        raise UserError(
            f"{folder}: is a symbolic link, and a stage would write or delete where it leads; remove it, or "
            "choose another run: --run NAME"
        )


def check_partial(partial: Path, force: bool) -> None:
    """Raise `UserError` if a partial folder is not what a stage left there; a link even with `force`."""
    if any(path.is_symlink() for path in (partial, partial / "work", partial / "output")):
        raise UserError(f"{partial}: is or contains a symbolic link; remove it")
    if force or not partial.exists():
        return
    names = {path.name for path in partial.iterdir()} if partial.is_dir() else {partial.name}
    foreign = sorted(names - PARTIAL_NAMES)
    if "fingerprint.json" not in names:
        foreign += [path.name for path in partial.glob("*/*")]
    if foreign:
        raise UserError(
            f"{partial}: contains files that no stage wrote ({', '.join(foreign[:3])}); move it away, or "
            "add --force to delete it"
        )


def has_work(work: Path) -> bool:
    """Return whether an interrupted run left something to resume from."""
    return work.is_dir() and any(work.iterdir())


def discard(partial: Path) -> None:
    """Delete a partial folder, its fingerprint last: one that is half deleted is still known as a stage's."""
    if partial.is_dir() and not partial.is_symlink():
        for path in partial.iterdir():
            if path.name != "fingerprint.json":
                delete(path)
    delete(partial)


def delete(path: Path) -> None:
    """Delete a folder, a file or a link, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe_changes(old: dict[str, Any], new: dict[str, Any], but: str | None = None) -> str:
    """Return each key whose value differs, with both values; "" if there is none.

    `but` is the last part of keys that are left out.
    """
    before, after = flatten_keys(old), flatten_keys(new)
    changed = [
        key
        for key in sorted(before | after)
        if before.get(key, ...) != after.get(key, ...) and key.rpartition(".")[2] != but
    ]
    return ", ".join(
        f"{key.removeprefix('config.')} was {before.get(key, 'not set')}, is {after.get(key, 'not set')}"
        for key in changed
    )
