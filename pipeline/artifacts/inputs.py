"""Open the inputs of a stage: artifacts, external folders, hub ids.

A refused input raises a `UserError` of one line with the command that makes the input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifacts import hub
from pipeline.artifacts.files import hash_files, hash_value, read_json
from pipeline.artifacts.manifest import (
    CHECKPOINT_KINDS,
    SCHEMA,
    Artifact,
    content_identity,
    read_manifest,
    sibling,
)
from pipeline.config import StageConfig
from pipeline.distributed.processes import broadcast
from pipeline.errors import UserError

# By kind: a folder that no stage wrote is accepted if it contains one of these files.
EXTERNAL_FILES = {"records": ("dataset_dict.json", "dataset_info.json"), "evaluation": ()} | dict.fromkeys(
    CHECKPOINT_KINDS, ("config.json", "adapter_config.json")
)


def require_artifact(
    source: str | Path, kind: str, make_command: str, revision: str | None = None
) -> Artifact:
    """Open an input of a stage: an artifact, an external checkpoint or dataset folder, or a hub id.

    `kind` is "records", "policy", "reward", "evaluation" or "model"; a "model" is any checkpoint, also a
    policy or a reward model. A hub id is accepted for these three kinds of checkpoints, and `revision` is its
    branch, tag or commit. The hub is queried only for a commit that is not yet known. `make_command` is the
    command that makes the input, or other instructions on how to get it.

    Raises `UserError`, one line with the path and `make_command`, if the input is missing, half-written,
    altered (with the file's name), of another kind, or of a newer version.
    """
    path = Path(source)
    if kind in CHECKPOINT_KINDS and hub.is_hub_id(str(source)):
        return open_hub(str(source), kind, broadcast(hub.resolve_commit(str(source), revision)))
    manifest = read_manifest(path)
    if (
        not manifest
        and not _is_half_written(path)
        and any((path / name).is_file() for name in EXTERNAL_FILES[kind])
    ):
        return open_external(path, kind)
    if problem := find_problem(path, manifest, kind):
        raise UserError(f"{path}: {problem}; run: {make_command}")
    return Artifact(path, manifest)


def open_inputs(config: StageConfig) -> dict[str, Artifact]:
    """Open the inputs that a stage's config declares, except a model from scratch. Raises `UserError`."""
    opened = {}
    for name, (kind, stage) in config.inputs.items():
        source, revision = getattr(config, name), None
        instructions = [config.make_command(stage)] if stage else []
        if kind == "model":
            instructions.append(f"name a hub id or a folder in {name!r}")
            revision = getattr(config, "revision", None)
        if source != "scratch":
            opened[name] = require_artifact(source, kind, ", or ".join(instructions), revision)
    return opened


def open_external(path: str | Path, kind: str) -> Artifact:
    """Open a file or folder that no stage wrote as an input; each of its files is part of its identity.

    Raises `UserError` if it does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist; expected a file or a folder; check the path in the config")
    return _external_artifact(path, kind, files=hash_files(path))


def open_hub(hub_id: str, kind: str, revision: str | None) -> Artifact:
    """Open a hub repository as an input; its commit is part of its identity."""
    return _external_artifact(Path(hub_id), kind, hub=hub_id, revision=revision)


def _external_artifact(path: Path, kind: str, **content: Any) -> Artifact:
    manifest = {"schema": SCHEMA, "kind": kind, "foreign": True, **content}
    return Artifact(path, manifest | {"identity": hash_value([kind, content])})


def verify_artifact(artifact: Artifact) -> None:
    """Read every file of the manifest again, without the hash cache.

    Raises `UserError` with the first file that is missing or altered.
    """
    if problem := _find_altered(artifact.path, artifact.manifest.get("files", {}), cached=False):
        raise UserError(
            f"{artifact.path}: {problem}; run its stage again, or download it again if no stage made it"
        )


def artifact_status(folder: Path) -> tuple[str, str]:
    """Return the status of a stage's folder, and the reason for it.

    The status is "done", "altered", "not made", or "out of date": an input has changed, or the base of an
    adapter has changed or is missing.
    """
    manifest = read_manifest(folder)
    if not manifest:
        is_begun = (folder / "config.yaml").exists()
        return ("altered", "no valid manifest.json") if is_begun else ("not made", "")
    if problem := find_problem(folder, manifest, manifest["kind"]):
        return "out of date" if problem == _find_base_problem(folder, manifest) else "altered", problem

    config = manifest["fingerprint"]["config"]
    run = Path(config["runs"], config["run"])
    for name, described in manifest["inputs"].items():
        path = Path(described["path"])
        # The whole run may have been moved.
        current = folder.parent / path.relative_to(run) if path.is_relative_to(run) else path
        if "hub" not in described and current.exists() and not _matches(described, current):
            return "out of date", f"{name} was {described['identity'][:8]}, and {current} has changed since"
    return "done", ""


def find_problem(path: Path, manifest: dict[str, Any], kind: str) -> str | None:
    """Return why a path cannot be opened as an artifact of the kind, or None if it can."""
    if not manifest and _is_half_written(path):
        return "half-written (no valid manifest.json): its stage was interrupted"
    if not path.exists():
        return "does not exist"
    if not manifest:
        names = ", ".join(("manifest.json", *EXTERNAL_FILES[kind]))
        return f"is not an artifact of kind {kind!r}: expected one of {names} in it"
    if manifest["schema"] > SCHEMA:
        return (
            f"written by a newer version (schema {manifest['schema']}, this one reads {SCHEMA}): upgrade, or "
            "make it again"
        )
    if manifest["kind"] != kind and not (kind == "model" and manifest["kind"] in CHECKPOINT_KINDS):
        return f"is of kind {manifest['kind']!r}, expected {kind!r}"
    if manifest["identity"] != content_identity(manifest["kind"], manifest["files"]):
        return "manifest.json was altered: its identity is not that of its files"
    return _find_altered(path, manifest["files"], cached=True) or _find_base_problem(path, manifest)


def _find_base_problem(path: Path, manifest: dict[str, Any]) -> str | None:
    """Return a message if the base of an adapter is missing or has changed, else None.

    An adapter is only valid with the base that it was trained on. A hub id cannot change, because it stands
    for one commit. The model that training started from is another one if it is an adapter itself.
    """
    base = manifest["inputs"].get("model", {})
    if not (path / "adapter_config.json").is_file() or "path" not in base or "hub" in base:
        return None
    if not is_own_base(path, base["path"]):
        return None
    folder = Path(base["path"])
    if not folder.exists():
        return f"is an adapter of {folder}, which no longer exists: restore it"
    if not _matches(base, folder):
        return f"is an adapter of {folder}, which has changed since: restore the version it was trained on"
    return None


def is_own_base(adapter: Path, base: str) -> bool:
    """Return whether the adapter in a folder is one of `base`, by its adapter_config.json."""
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    return named is None or Path(named) == Path(base)


def _matches(described: dict[str, Any], path: Path) -> bool:
    """Return whether the content of `path` is what a manifest describes as an input."""
    if "files" in described:
        return hash_files(path) == described["files"]
    return read_manifest(path).get("identity") == described.get("reads", described["identity"])


def _find_altered(path: Path, files: dict[str, str], cached: bool) -> str | None:
    """Return a message about the first missing or altered file, or None if all files have their hash."""
    hashes = hash_files(path, cached=cached) if files else {}
    for name, expected in files.items():
        if name not in hashes:
            return f"{name} is missing"
        if hashes[name] != expected:
            return f"{name} was altered: its SHA-256 is {hashes[name][:12]}…, expected {expected[:12]}…"
    return None


def _is_half_written(path: Path) -> bool:
    """Return whether a stage began to write a path that has no manifest."""
    return (
        (path / "config.yaml").exists() or sibling(path, "partial").exists() or sibling(path, "old").exists()
    )
