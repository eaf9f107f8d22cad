"""Artifacts: the only interface between stages.

A stage writes one folder, `runs/<run>/<stage>/`, with `build_artifact`, and opens its inputs with
`require_artifact`:

    runs/demo/
      sft/             the published artifact: the stage's files, config.yaml (resolved), and manifest.json,
                       which records the hash of every other file
      .sft.partial/    the artifact while it is built: fingerprint.json, output/ (becomes sft/), work/
                       (checkpoints, kept after an interruption), and old/, the previous sft/, between the
                       two renames of a publication
      .lock            held by the one process that writes the run

Two digests must not be confused. The *identity* describes the content of an artifact: its kind and its files,
without times and absolute paths. The *fingerprint* describes its origin: the config, the identities of the
inputs, the version of the results. An artifact with an unchanged fingerprint is not built again.

What vouches for what:

- `files` of the manifest vouch for every other visible file of the folder and of its subfolders: each has
  its SHA-256 there. A visible file that is not listed is refused, because a library could load it. Hidden
  files are the user's; they are never read.
- `digest` vouches for the rest of the manifest: metrics, rows, inputs, versions, settings. A manifest whose
  digest does not fit is no manifest: none of its figures is shown. Manifests of schema 1 have no digest. They
  open if their form is right and if what is recorded twice agrees; their figures are taken as they are.
- `manifest_hash` of an input vouches for the manifest of that input, digest included. It is compared while
  the input is still where it was.
- fingerprint.json vouches for the checkpoints beside it, until they are published.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import hash_file, read_json
from pipeline.artifacts.schema import SCHEMA, Fingerprint, check_json, find_fault, manifest_digest

# The last version in which a stage began to compute something else from the same config and inputs. It is
# part of the fingerprint: raise it only if results change.
RESULTS_VERSION = "0.5.0"

OUR_KEYS = {"fingerprint", "identity", "config_hash"}  # manifests of other tools have none of them

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
    """Return the manifest of a folder, or {} if there is none that a stage wrote."""
    return load_manifest(path)[0]


def load_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the manifest of a folder and None, or {} and why its manifest.json is not as a stage wrote it.

    ({}, None) if the folder has no manifest.json, or that of another tool. Raises `OSError` if it cannot be
    read.
    """
    manifest = read_json(path / "manifest.json")
    if not OUR_KEYS & manifest.keys():
        return {}, None
    fault = find_fault(manifest)
    return ({}, fault) if fault else (manifest, None)


def read_fingerprint(partial: Path) -> dict[str, Any]:
    """Return the fingerprint of a folder in progress, or {} if there is none that a stage wrote."""
    fingerprint = read_json(partial / "fingerprint.json")
    with suppress(ValueError):  # a ValidationError is one
        Fingerprint.model_validate(check_json(fingerprint))
        return fingerprint
    return {}


def new_manifest(values: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with its schema and its digest. Raises `ValueError` if a value is out of range."""
    manifest = json.loads(json.dumps({"schema": SCHEMA, **values}))
    manifest |= {"digest": manifest_digest(manifest)}
    if fault := find_fault(manifest):
        raise ValueError(fault)
    return manifest


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
