"""Opening the inputs of a stage: artifacts, external folders, hub ids; each refusal is one line with the command that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifacts import hub
from pipeline.artifacts.files import hash_files, hash_value
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

# kind -> a folder that no stage wrote is accepted if it holds one of these
EXTERNAL_FILES = {"records": ("dataset_dict.json", "dataset_info.json"), "evaluation": ()} | dict.fromkeys(
    CHECKPOINT_KINDS, ("config.json", "adapter_config.json")
)


# Opening an input


def require_artifact(source: str | Path, kind: str, fix: str, revision: str | None = None) -> Artifact:
    """Open an input of a stage: an artifact, a foreign checkpoint or dataset folder, or (for a policy, reward or model) a hub id.

    `kind` is "records", "policy", "reward", "evaluation" or "model" (any checkpoint: a policy or a reward will do). `fix` is the command
    that makes the input, `revision` a hub id's branch, tag or commit. Raises UserError, one line with path and `fix`, if it is missing,
    half-written, altered (names the file), of another kind, or of a newer version. The hub is asked only for a commit not yet known.
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
        raise UserError(f"{path}: {problem}; run: {fix}")
    return Artifact(path, manifest)


def open_inputs(config: StageConfig) -> dict[str, Artifact]:
    """Open the inputs that a stage's config declares, except a model from scratch. Raises `UserError`."""
    opened = {}
    for name, (kind, stage) in config.inputs.items():
        source, revision = getattr(config, name), None
        fix = [config.make_command(stage)] if stage else []
        if kind == "model":
            fix.append(f"name a hub id or a folder in {name!r}")
            revision = getattr(config, "revision", None)
        if source != "scratch":
            opened[name] = require_artifact(source, kind, ", or ".join(fix), revision)
    return opened


def open_external(path: str | Path, kind: str) -> Artifact:
    """A file or folder that no stage wrote, as an input; each of its files counts for its identity. UserError if it does not exist."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist; expected a file or a folder; check the path in the config")
    return _external(path, kind, files=hash_files(path))


def open_hub(hub_id: str, kind: str, revision: str | None) -> Artifact:
    """A hub repository as an input; its commit counts for its identity."""
    return _external(Path(hub_id), kind, hub=hub_id, revision=revision)


def verify_artifact(artifact: Artifact) -> None:
    """Read every vouched file again, whatever the hash cache says. UserError naming the first that is missing or altered."""
    if problem := _find_altered(artifact.path, artifact.manifest.get("files", {}), cached=False):
        raise UserError(
            f"{artifact.path}: {problem}; run its stage again, or fetch it again if no stage made it"
        )


def artifact_status(folder: Path) -> tuple[str, str]:
    """Of a stage's folder: "done", "altered", "out of date" (an input is another now, or an adapter's base is gone) or "not made"; why."""
    manifest = read_manifest(folder)
    if not manifest:
        return (
            ("altered", "no valid manifest.json") if (folder / "config.yaml").exists() else ("not made", "")
        )
    if problem := find_problem(folder, manifest, manifest["kind"]):
        return "out of date" if problem == _moved_base(folder, manifest) else "altered", problem
    config = manifest["fingerprint"]["config"]
    own = Path(config["runs"], config["run"])
    for name, made_from in manifest["inputs"].items():
        path = Path(made_from["path"])
        here = (
            folder.parent / path.relative_to(own) if path.is_relative_to(own) else path
        )  # a run may have been moved as a whole
        if "hub" not in made_from and here.exists() and not _matches(made_from, here):
            return "out of date", f"{name} was {made_from['identity'][:8]}, and {here} is another now"
    return "done", ""


def _external(path: Path, kind: str, **facts: Any) -> Artifact:
    return Artifact(
        path,
        {"schema": SCHEMA, "kind": kind, "foreign": True, **facts, "identity": hash_value([kind, facts])},
    )


def find_problem(path: Path, manifest: dict[str, Any], kind: str) -> str | None:
    """Why this cannot be opened as an artifact of the kind, None if it can."""
    if not manifest and _is_half_written(path):
        return "half-written (no valid manifest.json): its stage was interrupted"
    if not path.exists():
        return "does not exist"
    if not manifest:
        return f"is no artifact of kind {kind!r}: expected one of {', '.join(('manifest.json', *EXTERNAL_FILES[kind]))} in it"
    if manifest["schema"] > SCHEMA:
        return f"written by a newer version (schema {manifest['schema']}, this one reads {SCHEMA}): upgrade, or make it again"
    if manifest["kind"] != kind and not (kind == "model" and manifest["kind"] in CHECKPOINT_KINDS):
        return f"is of kind {manifest['kind']!r}, expected {kind!r}"
    if manifest["identity"] != content_identity(manifest["kind"], manifest["files"]):
        return "manifest.json was altered: its identity is not that of its files"
    return _find_altered(path, manifest["files"], cached=True) or _moved_base(path, manifest)


def _moved_base(path: Path, manifest: dict[str, Any]) -> str | None:
    """Of an adapter: whether the model it was trained on, and is worth nothing without, is another now. A hub id stands for one commit."""
    base = manifest["inputs"].get("model", {})
    if not (path / "adapter_config.json").is_file() or "path" not in base or "hub" in base:
        return None
    folder = Path(base["path"])
    if not folder.exists():
        return f"is an adapter of {folder}, which is no longer there: put it back"
    return (
        None
        if _matches(base, folder)
        else f"is an adapter of {folder}, which has changed since: put back what it was trained on"
    )


def _matches(described: dict[str, Any], path: Path) -> bool:
    """Whether `path` holds what a manifest describes as an input."""
    if "files" in described:
        return hash_files(path) == described["files"]
    return read_manifest(path).get("identity") == described.get("reads", described["identity"])


def _find_altered(path: Path, files: dict[str, str], cached: bool) -> str | None:
    found = hash_files(path, cached=cached) if files else {}
    for name, expected in files.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected:
            return f"{name} was altered: its SHA-256 is {found[name][:12]}…, expected {expected[:12]}…"
    return None


def _is_half_written(path: Path) -> bool:
    """Of a path without a manifest: whether a stage began it."""
    return (
        (path / "config.yaml").exists() or sibling(path, "partial").exists() or sibling(path, "old").exists()
    )
