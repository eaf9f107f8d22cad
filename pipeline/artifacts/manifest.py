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

import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import hash_file, hash_value, read_json

SCHEMA = 1
# The last version in which a stage began to compute something else from the same config and inputs. It is part of the
# fingerprint: raise it only together with results.
RESULTS_VERSION = "0.1.0"

MANIFEST = {
    "schema": int, "kind": str, "stage": str, "seed": int, "created_at": str, "identity": str, "versions": dict, "fingerprint": dict,
    "inputs": dict, "files": dict, "rows": dict, "metrics": dict,
}  # fmt: skip

CHECKPOINT_KINDS = ("policy", "reward", "model")

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


@dataclass(frozen=True)
class Artifact:
    """An opened input. `path` is a folder or a file, or holds a hub id; `manifest` is read from it, or made up when it is foreign."""

    path: Path
    manifest: dict[str, Any]

    @property
    def identity(self) -> str:
        return str(self.manifest["identity"])

    @property
    def is_external(self) -> bool:
        return bool(self.manifest.get("foreign"))

    @property
    def revision(self) -> str | None:
        """The commit that a hub id stands for; None for a folder."""
        return self.manifest.get("revision")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, or {} if there is none, or none of ours."""
    manifest = read_json(path / "manifest.json")
    return manifest if all(isinstance(manifest.get(key), types) for key, types in MANIFEST.items()) else {}


def content_identity(kind: str, files: dict[str, str]) -> str:
    left_out = NOT_IDENTITY - (
        {"metrics.json"} if kind == "evaluation" else set()
    )  # all that an evaluation is
    return hash_value([kind, sorted(item for item in files.items() if Path(item[0]).name not in left_out)])


def describe_input(artifact: Artifact) -> dict[str, Any]:
    """An input as a manifest records it; what has no manifest of its own, with its hashes or its revision; and who serves it."""
    described: dict[str, Any] = {"path": artifact.path.as_posix(), "identity": artifact.identity}
    described |= {key: artifact.manifest[key] for key in ("served", "reads") if key in artifact.manifest}
    if not artifact.is_external:
        return described | {"manifest_hash": hash_file(artifact.path / "manifest.json")}
    return described | {
        key: artifact.manifest[key]
        for key in ("foreign", "hub", "revision", "files")
        if key in artifact.manifest
    }


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("pipeline", *DISTRIBUTIONS):
        with suppress(PackageNotFoundError):
            found[name] = version("rlhf-stage" if name == "pipeline" else name)
    return found


def flatten_keys(value: Any, key: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict of dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    parts = [flatten_keys(item, f"{key}.{name}" if key else str(name)) for name, item in items]
    return {name: leaf for part in parts for name, leaf in part.items()} if parts else {key: value}


def work_folder(folder: Path) -> Path:
    """Where checkpoints are while `folder` is made; what is beside it goes with it."""
    return sibling(folder, "partial") / "work"


def artifact_folder(work: Path) -> Path:
    """The folder that is made of a `work_folder`."""
    return work.parent.with_name(work.parent.name.removeprefix(".").removesuffix(".partial"))


def sibling(folder: Path, suffix: str) -> Path:
    return folder.parent / f".{folder.name}.{suffix}"
