"""Open the inputs of a stage: artifacts, external folders, hub ids.

A refused input raises a `UserError` of one line with the command that makes the input.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artifacts import hub
from pipeline.artifacts.files import hash_file, hash_files, hash_value, is_hidden, list_names, read_json
from pipeline.artifacts.manifest import Artifact, load_manifest, read_manifest, sibling
from pipeline.artifacts.schema import CHECKPOINT_KINDS, CRITIC_FILE, SCHEMA
from pipeline.config import StageConfig
from pipeline.distributed.processes import broadcast
from pipeline.errors import UserError

# By kind: a folder that no stage wrote is accepted if it contains one of these files.
EXTERNAL_FILES = {
    "records": ("dataset_dict.json", "dataset_info.json"),
    "evaluation": (),
    "critic": (CRITIC_FILE,),
} | dict.fromkeys(CHECKPOINT_KINDS, ("config.json", "adapter_config.json"))
HALF_WRITTEN = "half-written (no valid manifest.json): its stage was interrupted"
PARTS = re.compile(
    r"best|adapter|critic|policies|step-\d+"
)  # folders of an artifact that hold a model of their own
WEIGHTS = re.compile(r"(?!value_head\.|training_args\.)[^/]+\.(safetensors|bin)")
# `datasets` leaves them beside the records that a user maps; no stage reads them.
DATASETS_CACHE = re.compile(r"(.*/)?cache-[0-9a-f]+\.arrow")
LOOKS = 50  # at a folder that is being replaced, 10 ms apart

Result = TypeVar("Result")


def require_artifact(
    source: str | Path, kind: str, make_command: str, revision: str | None = None
) -> Artifact:
    """Open an input of a stage: an artifact, an external checkpoint or dataset folder, or a hub id.

    `kind` is "records", "policy", "reward", "evaluation", "model" or "critic". A "model" is any checkpoint,
    also a policy or a reward model; a "critic" is a folder inside a policy that PPO wrote. A hub id is
    accepted for the three kinds of checkpoints, and `revision` is its branch, tag or commit. The hub is
    queried only for a commit that is not yet known. `make_command` is the command that makes the input, or
    other instructions on how to get it.

    Raises `UserError`, one line with the path and `make_command`, if the input is missing, half-written,
    altered (with the file's name), of another kind, or of a newer version.
    """
    path = Path(source)
    if kind in CHECKPOINT_KINDS and hub.is_hub_id(str(source)):
        return open_hub(str(source), kind, broadcast(hub.resolve_commit(str(source), revision)))
    manifest, problem = inspect_artifact(path, kind)
    if not manifest and not is_begun(path) and any((path / name).is_file() for name in EXTERNAL_FILES[kind]):
        problem = _find_problem_around(path)
        if not problem:
            return open_external(path, kind)
    if problem:
        raise UserError(f"{path}: {problem}; run: {make_command}")
    return Artifact(path, manifest)


def inspect_artifact(
    path: Path, kind: str | None = None, *, cached: bool = True
) -> tuple[dict[str, Any], str | None]:
    """Return the manifest of a folder, and why it cannot be opened as an artifact of the kind, if it cannot.

    Without `kind` it may be of any kind. With `cached=False` every file is read. A folder that a stage
    publishes meanwhile is looked at again: the manifest and the files are of one publication.
    """

    def look() -> tuple[dict[str, Any], str | None]:
        manifest = read_manifest(path)
        return manifest, find_problem(path, manifest, kind or manifest.get("kind", "records"), cached=cached)

    return _undisturbed(path, look)


def published_manifest(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Return what `load_manifest` does, of a folder that a stage may publish meanwhile."""
    return _undisturbed(folder, lambda: load_manifest(folder))


def _undisturbed(folder: Path, look: Callable[[], Result]) -> Result:
    """Return what `look` sees of a folder that no publication replaces meanwhile."""
    for _ in range(LOOKS):
        before = _publication(folder)
        seen: Result | None = None
        with suppress(FileNotFoundError):  # a file was listed, and is gone
            seen = look()
        if seen is not None and before == _publication(folder) and not _is_swapped_out(folder):
            return seen
        time.sleep(0.01)
    return look()


def _publication(folder: Path) -> tuple[int, ...]:
    """Return what differs from one publication of a folder to the next."""
    try:
        return tuple(stat.st_ino for stat in (folder.stat(), (folder / "manifest.json").stat()))
    except (FileNotFoundError, NotADirectoryError):
        return ()


def _is_swapped_out(folder: Path) -> bool:
    """Return whether a publication is between its two renames."""
    return not folder.exists() and (sibling(folder, "partial") / "old").exists()


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
    """Read the manifest and every file that it lists again, without the hash cache.

    Raises `UserError` with the first fault: a file that is missing, altered or not listed, or the manifest.
    """
    if artifact.is_external:
        problem = _find_altered(artifact.path, artifact.manifest.get("files", {}), cached=False)
    else:
        problem = inspect_artifact(artifact.path, cached=False)[1]
    if problem:
        raise UserError(
            f"{artifact.path}: {problem}; run its stage again, or download it again if no stage made it"
        )


def artifact_status(folder: Path) -> tuple[str, str]:
    """Return the status of a stage's folder, and the reason for it.

    The status is "done", "altered", "not made", or "out of date": an input has changed, or the base of an
    adapter has changed or is missing. An artifact is also done if an input was made again with the same
    content; the reason says so.
    """
    return _undisturbed(folder, lambda: _find_status(folder))


def _find_status(folder: Path) -> tuple[str, str]:
    manifest, fault = load_manifest(folder)
    if not manifest:
        is_begun = (folder / "config.yaml").exists()
        return ("altered", fault or "no valid manifest.json") if fault or is_begun else ("not made", "")
    if problem := find_problem(folder, manifest, manifest["kind"]):
        return "out of date" if problem == _find_base_problem(folder, manifest) else "altered", problem

    config = manifest["fingerprint"]["config"]
    run = Path(config["runs"], config["run"])
    notes = []
    for name, described in manifest["inputs"].items():
        path = Path(described["path"])
        # The whole run may have been moved.
        current = folder.parent / path.relative_to(run) if path.is_relative_to(run) else path
        if "hub" in described or not current.exists():
            continue
        if not _matches(described, current):
            return "out of date", f"{name} was {described['identity'][:8]}, and {current} has changed since"
        if (
            "manifest_hash" in described
            and hash_file(current / "manifest.json") != described["manifest_hash"]
        ):
            notes.append(f"the manifest.json of its input {name} has changed since, and its content has not")
    return "done", "; ".join(notes)


def find_problem(path: Path, manifest: dict[str, Any], kind: str, *, cached: bool = True) -> str | None:
    """Return why a path cannot be opened as an artifact of the kind, or None if it can."""
    if not manifest and (fault := load_manifest(path)[1]):
        return fault
    if not manifest and is_begun(path):
        return HALF_WRITTEN
    if not path.exists():
        return "does not exist"
    if not manifest:
        names = ", ".join(("manifest.json", *EXTERNAL_FILES[kind]))
        return f"is not an artifact of kind {kind!r}: expected one of {names} in it"
    if manifest["kind"] != kind and not (kind == "model" and manifest["kind"] in CHECKPOINT_KINDS):
        return f"is of kind {manifest['kind']!r}, expected {kind!r}"
    if manifest["kind"] in CHECKPOINT_KINDS and not any(map(WEIGHTS.fullmatch, manifest["files"])):
        return "manifest.json lists no weights (*.safetensors, *.bin): it is no model"
    if unlisted := [name for name in find_unlisted(path, manifest) if not is_hidden(name)]:
        return (
            f"contains {unlisted[0]}, which its manifest.json does not list and a library could load: "
            "move it away"
        )
    return _find_altered(path, manifest["files"], cached) or _find_base_problem(path, manifest)


def find_unlisted(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Return the files of a folder, hidden ones too, that its manifest does not list."""
    names = set(list_names(folder)) - {"manifest.json", *manifest.get("files", {})}
    return sorted(name for name in names if not DATASETS_CACHE.fullmatch(name))


def _find_problem_around(path: Path) -> str | None:
    """Return what is wrong with the artifact that a folder such as `ppo/best` is a part of, or None."""
    for root in path.parents[:3]:
        manifest, fault = load_manifest(root)
        part = path.relative_to(root).as_posix() + "/"
        if not manifest and PARTS.fullmatch(path.name) and (fault or _is_stage_config(root / "config.yaml")):
            return f"is a part of {root}, which is {fault or HALF_WRITTEN}"
        if any(name.startswith(part) for name in manifest.get("files", {})):
            problem = inspect_artifact(root)[1]
            return problem and f"is a part of {root}: {problem}"
    return None


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


def _is_stage_config(file: Path) -> bool:
    """Return whether a stage wrote a config.yaml; other tools write files of that name too."""
    return file.is_file() and {b"run:", b"runs:"} <= {line.split(b" ")[0] for line in file.open("rb")}


def is_begun(path: Path) -> bool:
    """Return whether a stage began to write a path that has no manifest."""
    return (
        (path / "config.yaml").exists()
        or load_manifest(path)[1] is not None
        or sibling(path, "partial").exists()
    )
