"""Artifacts: the only interface between stages.

A stage writes one folder, `runs/<run>/<stage>/`, with `build_artifact`, and opens its inputs with
`require_artifact`:

    runs/demo/
      sft/             the published artifact: the stage's files, config.yaml (resolved), and manifest.json,
                       which records the hash of every other file
      .sft.partial/    the artifact while it is built: fingerprint.json, output/ (becomes sft/) and work/
                       (checkpoints, kept after an interruption)
      .sft.old         the previous sft/, between the two renames of a publication
      .lock            held by the one process that writes the run

Two digests must not be confused. The *identity* describes the content of an artifact: its kind and its files,
without times and absolute paths. The *fingerprint* describes its origin: the config, the identities of the
inputs, the version of the results. An artifact with an unchanged fingerprint is not built again.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import hash_file, hash_value, read_json

SCHEMA = 1
# The last version in which a stage began to compute something else from the same config and inputs. It is
# part of the fingerprint: raise it only if results change.
RESULTS_VERSION = "0.3.0"

MANIFEST_TYPES = {
    "schema": int,
    "kind": str,
    "stage": str,
    "seed": int,
    "created_at": str,
    "identity": str,
    "versions": dict,
    "fingerprint": dict,
    "inputs": dict,
    "files": dict,
    "rows": dict,
    "metrics": dict,
}

CHECKPOINT_KINDS = ("policy", "reward", "model")

# Files that describe the run rather than the result (training_args.bin pickles output paths and host names).
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
    """An opened input.

    `path` is a folder, a file or a hub id. `manifest` is read from the folder, or composed if the input is
    external.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def identity(self) -> str:
        """The digest of the content."""
        return str(self.manifest["identity"])

    @property
    def is_external(self) -> bool:
        """Whether no stage wrote the input."""
        return bool(self.manifest.get("foreign"))

    @property
    def revision(self) -> str | None:
        """The commit that a hub id resolves to; None for a folder."""
        return self.manifest.get("revision")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a folder, or {} if there is none or it has another form."""
    manifest = read_json(path / "manifest.json")
    is_valid = all(isinstance(manifest.get(key), types) for key, types in MANIFEST_TYPES.items())
    return manifest if is_valid else {}


def content_identity(kind: str, files: dict[str, str]) -> str:
    """Return the identity of an artifact: a digest of its kind, and of the names and hashes of its content.

    `files` are SHA-256 by path. Files that only describe the run (`NOT_IDENTITY`) are excluded.
    """
    # An evaluation consists of its metrics.
    excluded = NOT_IDENTITY - {"metrics.json"} if kind == "evaluation" else NOT_IDENTITY
    return hash_value([kind, sorted(item for item in files.items() if Path(item[0]).name not in excluded)])


def describe_input(artifact: Artifact) -> dict[str, Any]:
    """Return an input as the manifest records it.

    An external input is recorded with its hashes or its revision, a served reward model with its server.
    """
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
    """Return the versions of Python, of this package and of the libraries that are installed."""
    versions = {"python": platform.python_version()}
    for name in ("pipeline", *DISTRIBUTIONS):
        with suppress(PackageNotFoundError):
            versions[name] = version("rlhf-stage" if name == "pipeline" else name)
    return versions


def flatten_keys(value: Any, key: str = "") -> dict[str, Any]:
    """Flatten nested dicts and lists to one dict with dotted keys, below `key` if it is set."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)

    parts = [flatten_keys(item, f"{key}.{name}" if key else str(name)) for name, item in items]
    if not parts:
        return {key: value}
    return {name: leaf for part in parts for name, leaf in part.items()}


def work_folder(folder: Path) -> Path:
    """Return the folder for checkpoints while `folder` is built; it is deleted when `folder` is published."""
    return sibling(folder, "partial") / "work"


def artifact_folder(work: Path) -> Path:
    """Return the artifact's folder that belongs to a `work_folder`."""
    return work.parent.with_name(work.parent.name.removeprefix(".").removesuffix(".partial"))


def sibling(folder: Path, suffix: str) -> Path:
    """Return the hidden path beside `folder` with its name and `suffix`."""
    return folder.parent / f".{folder.name}.{suffix}"
