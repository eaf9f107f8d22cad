"""Artifacts: the only door between stages.

A stage writes one folder, `runs/<run>/<stage>/`, through `build`, and opens its inputs through `require`:

    runs/demo/
      sft/                 what is published: the stage's files, config.yaml (resolved), and manifest.json, which vouches for the rest
      .sft.partial/        while it is made: fingerprint.json, output/ (becomes sft/), work/ (checkpoints; outlives an interruption)
      .sft.old             the previous sft/, for the moment between two renames
      .lock                one writer at a time

Two digests, not to be confused. The *identity* says what an artifact is: its kind and the content of its files, no times, no absolute
paths. The *fingerprint* says what it was made from: config, identities of the inputs, package version; what has it is not made twice.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml
from filelock import FileLock, Timeout

from pipeline import hub
from pipeline.errors import UserError
from pipeline.files import digest, hash_files, list_files, read_json, sha256, sync, write_json
from pipeline.ranks import agree, is_main_process, lead

SCHEMA = 1
MANIFEST = {
    "schema": int, "kind": str, "stage": str, "seed": int, "created_at": str, "identity": str, "versions": dict, "fingerprint": dict,
    "inputs": dict, "files": dict, "rows": dict, "metrics": dict,
}  # fmt: skip
CHECKPOINT_KINDS = ("policy", "reward", "model")
# kind -> a folder that no stage wrote is accepted if it holds one of these
FOREIGN_FILES = {"records": ("dataset_dict.json", "dataset_info.json"), "evaluation": ()} | dict.fromkeys(
    CHECKPOINT_KINDS, ("config.json", "adapter_config.json")
)
# what tells about a run and is not what was made (training_args.bin is a pickle of output paths and host names)
NOT_IDENTITY = {
    "README.md",
    "config.yaml",
    "report.html",
    "summary.md",
    "log.jsonl",
    "metrics.json",
    "quarantine.jsonl",
    "training_args.bin",
}
DISTRIBUTIONS = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


class Config(Protocol):
    """What `build` needs of a stage's config."""

    stage: ClassVar[str]
    seed: int
    force: bool

    @property
    def folder(self) -> Path: ...
    def resolved(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Artifact:
    """An opened input. `path` is a folder or a file, or holds a hub id; `manifest` is read from it, or made up when it is foreign."""

    path: Path
    manifest: dict[str, Any]

    @property
    def identity(self) -> str:
        return str(self.manifest["identity"])

    @property
    def foreign(self) -> bool:
        return bool(self.manifest.get("foreign"))

    @property
    def revision(self) -> str | None:
        """The commit that a hub id stands for; None for a folder."""
        return self.manifest.get("revision")


# Opening an input


def require(source: str | Path, kind: str, fix: str, revision: str | None = None) -> Artifact:
    """Open an input of a stage: an artifact, a foreign checkpoint or dataset folder, or (for a policy, reward or model) a hub id.

    `kind` is "records", "policy", "reward", "evaluation" or "model" (any checkpoint: a policy or a reward will do). `fix` is the command
    that makes the input, `revision` a hub id's branch, tag or commit. Raises UserError, one line with path and `fix`, if it is missing,
    half-written, altered (names the file), of another kind, or of a newer version. The hub is asked only for a commit not yet known.
    """
    path = Path(source)
    if kind in CHECKPOINT_KINDS and hub.is_hub_id(str(source)):
        return from_hub(str(source), kind, agree(hub.commit(str(source), revision)))
    manifest = read_manifest(path)
    if not manifest and not _half_written(path) and any((path / name).is_file() for name in FOREIGN_FILES[kind]):
        return foreign(path, kind)
    if problem := _problem(path, manifest, kind):
        raise UserError(f"{path}: {problem}; run: {fix}")
    return Artifact(path, manifest)


def foreign(path: str | Path, kind: str) -> Artifact:
    """A file or folder that no stage wrote, as an input; each of its files counts for its identity. UserError if it does not exist."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist; expected a file or a folder; check the path in the config")
    return _foreign(path, kind, files=hash_files(path))


def from_hub(hub_id: str, kind: str, revision: str | None) -> Artifact:
    """A hub repository as an input; its commit counts for its identity."""
    return _foreign(Path(hub_id), kind, hub=hub_id, revision=revision)


def verify(artifact: Artifact) -> None:
    """Read every vouched file again, whatever the hash cache says. UserError naming the first that is missing or altered."""
    if problem := _altered(artifact.path, artifact.manifest.get("files", {}), cached=False):
        raise UserError(f"{artifact.path}: {problem}; run its stage again, or fetch it again if no stage made it")


def condition(folder: Path) -> tuple[str, str]:
    """Of a stage's folder: "done", "altered", "out of date" (an input is another now, or an adapter's base is gone) or "not made"; why."""
    manifest = read_manifest(folder)
    if not manifest:
        return ("altered", "no valid manifest.json") if (folder / "config.yaml").exists() else ("not made", "")
    if problem := _problem(folder, manifest, manifest["kind"]):
        return "out of date" if problem == _base_moved(folder, manifest) else "altered", problem
    config = manifest["fingerprint"]["config"]
    own = Path(config["runs"], config["run"])
    for name, made_from in manifest["inputs"].items():
        path = Path(made_from["path"])
        here = folder.parent / path.relative_to(own) if path.is_relative_to(own) else path  # a run may have been moved as a whole
        if "hub" not in made_from and here.exists() and not _is_still(made_from, here):
            return "out of date", f"{name} was {made_from['identity'][:8]}, and {here} is another now"
    return "done", ""


def _foreign(path: Path, kind: str, **facts: Any) -> Artifact:
    return Artifact(path, {"schema": SCHEMA, "kind": kind, "foreign": True, **facts, "identity": digest([kind, facts])})


def _problem(path: Path, manifest: dict[str, Any], kind: str) -> str | None:
    """Why this cannot be opened as an artifact of the kind, None if it can."""
    if not manifest and _half_written(path):
        return "half-written (no valid manifest.json): its stage was interrupted"
    if not path.exists():
        return "does not exist"
    if not manifest:
        return f"is no artifact of kind {kind!r}: expected one of {', '.join(('manifest.json', *FOREIGN_FILES[kind]))} in it"
    if manifest["schema"] > SCHEMA:
        return f"written by a newer version (schema {manifest['schema']}, this one reads {SCHEMA}): upgrade, or make it again"
    if manifest["kind"] != kind and not (kind == "model" and manifest["kind"] in CHECKPOINT_KINDS):
        return f"is of kind {manifest['kind']!r}, expected {kind!r}"
    if manifest["identity"] != _identity(manifest["kind"], manifest["files"]):
        return "manifest.json was altered: its identity is not that of its files"
    return _altered(path, manifest["files"], cached=True) or _base_moved(path, manifest)


def _base_moved(path: Path, manifest: dict[str, Any]) -> str | None:
    """Of an adapter: whether the model it was trained on, and is worth nothing without, is another now. A hub id stands for one commit."""
    base = manifest["inputs"].get("model", {})
    if not (path / "adapter_config.json").is_file() or "path" not in base or "hub" in base:
        return None
    folder = Path(base["path"])
    if not folder.exists():
        return f"is an adapter of {folder}, which is no longer there: put it back"
    return None if _is_still(base, folder) else f"is an adapter of {folder}, which has changed since: put back what it was trained on"


def _is_still(described: dict[str, Any], path: Path) -> bool:
    """Whether `path` holds what a manifest describes as an input."""
    if "files" in described:
        return hash_files(path) == described["files"]
    return read_manifest(path).get("identity") == described.get("reads", described["identity"])


def _altered(path: Path, files: dict[str, str], cached: bool) -> str | None:
    found = hash_files(path, cached=cached) if files else {}
    for name, expected in files.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != expected:
            return f"{name} was altered: its SHA-256 is {found[name][:12]}…, expected {expected[:12]}…"
    return None


def _half_written(path: Path) -> bool:
    """Of a path without a manifest: whether a stage began it."""
    return (path / "config.yaml").exists() or _sibling(path, "partial").exists() or _sibling(path, "old").exists()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, or {} if there is none, or none of ours."""
    manifest = read_json(path / "manifest.json")
    return manifest if all(isinstance(manifest.get(key), types) for key, types in MANIFEST.items()) else {}


# Building


def build(
    config: Config,
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
        if _reusable(config, kind, fingerprint, say):
            say(f"{config.stage}: unchanged, reusing {folder}")
            return False
        _start(config, output, work, fingerprint, say)
        return True

    def publish() -> None:
        _seal(output, _manifest(config, kind, inputs, fingerprint, result))
        _swap(output, folder)

    with ExitStack() as held:
        if lead(begin):
            result = make(output, work) if is_main_process() or on_every_rank else {}
            lead(publish)
    return folder


def _fingerprint(config: Config, inputs: dict[str, Artifact]) -> dict[str, Any]:
    identities = {name: artifact.identity for name, artifact in inputs.items()}
    made_from = {"config": config.resolved(), "inputs": identities, "version": _versions().get("pipeline", "not installed")}
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


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run's lock, which the operating system lets go when this process dies."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run / ".lock", timeout=0).acquire()
    except Timeout:
        raise UserError(f"{run} is being written by another process; wait until it ends, or name another run: --run NAME") from None
    with lock:
        yield


def _repair(folder: Path, kind: str) -> None:
    """Put right what a crash in the middle of `_swap` left behind."""
    old, partial = _sibling(folder, "old"), _sibling(folder, "partial")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    manifest = read_manifest(folder)
    if manifest and manifest.get("fingerprint") == read_json(partial / "fingerprint.json") and not _problem(folder, manifest, kind):
        shutil.rmtree(partial, ignore_errors=True)  # what it would become is published


def _reusable(config: Config, kind: str, fingerprint: dict[str, Any], say: Callable[[str], object]) -> bool:
    manifest = read_manifest(config.folder)
    if config.force or manifest.get("fingerprint") != fingerprint:
        return False
    problem = _problem(config.folder, manifest, kind)
    if problem:
        say(f"{config.stage}: {config.folder}: {problem}; making it again")
    return not problem


def _start(config: Config, output: Path, work: Path, fingerprint: dict[str, Any], say: Callable[[str], object]) -> None:
    """Resume the partial folder if it was made from the same, else begin a new one; refuse to lose what is not ours to lose."""
    folder, partial = config.folder, output.parent
    published = list_files(folder).keys()
    half_written = not read_manifest(folder) and "config.yaml" in published
    unknown = [] if half_written else sorted(published - {"manifest.json", *read_manifest(folder).get("files", {})})
    if unknown and not config.force:
        raise UserError(f"{folder}: holds what no stage wrote ({', '.join(unknown[:3])}); move it away, or add --force to replace it")
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
        changes = _differences(begun, fingerprint)
        raise UserError(f"{partial}: interrupted with other settings: {changes}; set them back to resume, or add --force to start afresh")
    output.mkdir()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    before, after = flatten(old), flatten(new)
    changed = [key for key in sorted(before | after) if before.get(key, ...) != after.get(key, ...)]
    return ", ".join(f"{key.removeprefix('config.')} was {before.get(key, 'not set')}, is {after.get(key, 'not set')}" for key in changed)


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict of dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    parts = [flatten(item, f"{key}.{name}" if key else str(name)) for name, item in items]
    return {name: leaf for part in parts for name, leaf in part.items()} if parts else {key: value}


def _manifest(
    config: Config, kind: str, inputs: dict[str, Artifact], fingerprint: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    """All of the manifest but the files and the identity, which `_seal` adds."""
    if unknown := result.keys() - {"metrics", "rows"}:
        raise ValueError(f"{config.stage}: make returned {sorted(unknown)}, expected no key but 'metrics' and 'rows'")
    return {
        "schema": SCHEMA,
        "kind": kind,
        "stage": config.stage,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "seed": config.seed,
        "config_hash": digest(fingerprint["config"]),
        "fingerprint": fingerprint,
        "inputs": {name: _describe(artifact) for name, artifact in inputs.items()},
        "rows": result.get("rows", {}),
        "metrics": result.get("metrics", {}),
    }


def _identity(kind: str, files: dict[str, str]) -> str:
    left_out = NOT_IDENTITY - ({"metrics.json"} if kind == "evaluation" else set())  # all that an evaluation is
    return digest([kind, sorted(item for item in files.items() if Path(item[0]).name not in left_out)])


def _describe(artifact: Artifact) -> dict[str, Any]:
    """An input as a manifest records it; what has no manifest of its own, with its hashes or its revision; and who serves it."""
    described: dict[str, Any] = {"path": artifact.path.as_posix(), "identity": artifact.identity}
    described |= {key: artifact.manifest[key] for key in ("served", "reads") if key in artifact.manifest}
    if not artifact.foreign:
        return described | {"manifest_hash": sha256(artifact.path / "manifest.json")}
    return described | {key: artifact.manifest[key] for key in ("foreign", "hub", "revision", "files") if key in artifact.manifest}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("pipeline", *DISTRIBUTIONS):
        with suppress(PackageNotFoundError):
            found[name] = version("rlhf-stage" if name == "pipeline" else name)
    return found


def _seal(output: Path, manifest: dict[str, Any]) -> None:
    """Write config.yaml, and manifest.json once everything it vouches for is on disk."""
    resolved = yaml.safe_dump(manifest["fingerprint"]["config"], sort_keys=False, allow_unicode=True)
    (output / "config.yaml").write_text(resolved, encoding="utf-8")
    files = hash_files(output, cached=False)
    sync(*output.rglob("*"))
    write_json(output / "manifest.json", manifest | {"files": files, "identity": _identity(manifest["kind"], files)})
    sync(output / "manifest.json", output)


def _swap(output: Path, folder: Path) -> None:
    """Put `output` in the place of `folder`; a crash anywhere in here is mended by `_repair`."""
    old = _sibling(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(output, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(output.parent, ignore_errors=True)


def work_folder(folder: Path) -> Path:
    """Where checkpoints are while `folder` is made; what is beside it goes with it."""
    return _sibling(folder, "partial") / "work"


def folder_of(work: Path) -> Path:
    """The folder that is made of a `work_folder`."""
    return work.parent.with_name(work.parent.name.removeprefix(".").removesuffix(".partial"))


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.parent / f".{folder.name}.{suffix}"
