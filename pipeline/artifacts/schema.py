"""The form of manifest.json and fingerprint.json: types and ranges, checked whenever one of them is read.

A manifest also has to agree with itself: see `Manifest.check_agreement`.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.artifacts.files import Digest, hash_value

SCHEMA = 2  # 1 has no `digest`; its artifacts still open

Kind = Literal["records", "policy", "reward", "evaluation"]
Stage = Literal["prepare", "sft", "reward", "ppo", "evaluate"]
CHECKPOINT_KINDS = ("policy", "reward", "model")

# PPO's critic: the folder in a policy's, and files of that folder. A value head beside the weights is of an
# older version.
CRITIC, CRITIC_FILE, VALUE_HEAD = "critic", "critic.json", "value_head.safetensors"

# Files that describe the run rather than the result (training_args.bin pickles output paths and host names).
NOT_IDENTITY = {
    "README.md",
    "config.yaml",
    "report.html",
    "summary.md",
    "log.jsonl",
    "metrics.json",
    "quarantine.jsonl",
    "merged_rows.jsonl",
    "rewards.json",
    "training_args.bin",
}

NEWER = "written by a newer version"
MAX_DEPTH = 64  # of nested objects and lists; what a stage writes has fewer than ten levels
MAX_NUMBER = 2**63
SURROGATE = re.compile("[\ud800-\udfff]")


def check_json(value: Any) -> Any:
    """Return plain data whose depth and texts can be printed and hashed. Raises `ValueError` for others."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii() and SURROGATE.search(item):
                raise ValueError("a text has a lone surrogate")
        if not below:
            return value
        level = below
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def check_counts(value: Any) -> Any:
    """Return nested counts. Raises `ValueError` for a number that is no count."""
    for leaf in _leaves(value):
        if isinstance(leaf, int | float) and not 0 <= leaf < MAX_NUMBER:
            raise ValueError("a number is no count")
    return value


def check_figures(value: Any) -> Any:
    """Return nested metrics. Raises `ValueError` for an integer that no arithmetic with floats could use.

    NaN and infinity are accepted, because older versions wrote them.
    """
    for leaf in _leaves(value):
        if isinstance(leaf, int) and abs(leaf) >= MAX_NUMBER:
            raise ValueError("an integer is out of range")
    return value


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [leaf for item in items for leaf in _leaves(item)]
    return [value]


def check_time(value: str) -> str:
    """Return a time in ISO format with its offset from UTC. Raises `ValueError` for others."""
    if datetime.fromisoformat(value).utcoffset() is None:
        raise ValueError("has no offset from UTC")
    return value


def check_place(value: str) -> str:
    """Return what may be a path. Raises `ValueError` if no path can be that."""
    if "\0" in value or not value:
        raise ValueError("is no path")
    return value


def check_name(value: str) -> str:
    """Return a file's path inside a folder. Raises `ValueError` if it leads out of it, or is hidden."""
    if value.startswith("/") or any(part.startswith(".") or not part for part in value.split("/")):
        raise ValueError(f"{value!r:.80} is no path inside the folder")
    return check_place(value)


Data = Annotated[dict[str, Any], AfterValidator(check_json)]
Counts = Annotated[Data, AfterValidator(check_counts)]
Figures = Annotated[Data, AfterValidator(check_figures)]
Place = Annotated[str, Field(max_length=4096), AfterValidator(check_place)]
Files = dict[Annotated[str, AfterValidator(check_name)], Digest]


class Strict(BaseModel):
    """JSON as it is written: no unknown key, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Fingerprint(Strict):
    """What decides a result: the config, the identities of the inputs, the version of the results."""

    config: Data
    inputs: dict[str, Digest]
    version: str

    @model_validator(mode="after")
    def check_run(self) -> Fingerprint:
        """Check that the config names its run. Raises `ValueError`."""
        for key in ("run", "runs"):
            if not isinstance(self.config.get(key), str) or "\0" in self.config[key]:
                raise ValueError(f"config.{key} is no name")
        return self


class Input(Strict):
    """An input of an artifact, as `describe_input` records it."""

    path: Place
    identity: Digest
    manifest_hash: Digest | None = None
    foreign: bool | None = None
    hub: str | None = None
    revision: str | None = None
    files: dict[Place, Digest] | None = None
    served: Data | None = None
    reads: Digest | None = None


class Manifest(Strict):
    """manifest.json. `digest` is that of everything else in it."""

    schema_: int = Field(alias="schema", ge=1, le=SCHEMA)
    kind: Kind
    stage: Stage
    created_at: Annotated[str, AfterValidator(check_time)]
    versions: dict[str, str]
    seed: int = Field(ge=0, lt=2**32)
    config_hash: Digest
    fingerprint: Fingerprint
    inputs: dict[str, Input]
    rows: Counts
    metrics: Figures
    files: Files
    identity: Digest
    digest: Digest | None = None

    @model_validator(mode="after")
    def check_agreement(self) -> Manifest:
        """Check what is recorded twice. Raises `ValueError`."""
        if (self.schema_ == 1) != (self.digest is None):
            raise ValueError("its digest is missing, or its schema is another")
        if self.config_hash != hash_value(self.fingerprint.config):
            raise ValueError("its config_hash is not that of its config")
        if self.fingerprint.config.get("seed", self.seed) != self.seed:
            raise ValueError("its seed is not that of its config")
        if self.fingerprint.inputs != {name: item.identity for name, item in self.inputs.items()}:
            raise ValueError("its inputs are not those of its fingerprint")
        if self.identity != content_identity(self.kind, self.files):
            raise ValueError("its identity is not that of its files")
        return self


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the digest of everything in a manifest but the digest itself."""
    return hash_value({key: value for key, value in manifest.items() if key != "digest"})


def find_fault(manifest: dict[str, Any]) -> str | None:
    """Return why an object is not the manifest that a stage wrote, or None if it is."""
    schema = manifest.get("schema")
    if type(schema) is int and schema > SCHEMA:
        return f"{NEWER} (schema {schema}, this one reads {SCHEMA}): upgrade, or make it again"
    try:
        Manifest.model_validate(check_json(manifest))
    except ValidationError as error:
        return f"manifest.json was altered: {first_fault(error)}"
    except ValueError as error:
        return f"manifest.json was altered: {error}"
    if "digest" in manifest and manifest["digest"] != manifest_digest(manifest):
        return "manifest.json was altered: its digest is not that of its content"
    return None


def first_fault(error: ValidationError) -> str:
    """Return the first fault that Pydantic found: the key, and what was expected."""
    fault = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(map(str, fault["loc"]))
    text = str(fault["msg"]).removeprefix("Value error, ")
    return f"{key}: {text}" if key else text


def content_identity(kind: str, files: dict[str, str]) -> str:
    """Return the identity of an artifact: a digest of its kind, and of the names and hashes of its content.

    `files` are SHA-256 by path. Files that only describe the run (`NOT_IDENTITY`) are excluded.
    """
    # An evaluation consists of its metrics.
    excluded = NOT_IDENTITY - {"metrics.json"} if kind == "evaluation" else NOT_IDENTITY
    return hash_value([kind, sorted(item for item in files.items() if Path(item[0]).name not in excluded)])
