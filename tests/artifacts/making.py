"""Make small artifacts, interrupted runs and failures."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import (
    require_artifact,
)
from pipeline.artifacts.manifest import Artifact
from pipeline.errors import UserError

FIX = "rlhf sft --config configs/demo/sft.yaml"


@dataclass
class Config:
    stage: ClassVar[str] = "sft"
    runs: str
    run: str = "demo"
    seed: int = 0
    force: bool = False
    training: dict[str, Any] = field(default_factory=lambda: {"learning_rate": 0.5, "steps": [1, 2]})

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.run / self.stage

    def resolved(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "force"}


class Make:
    """A stage's work: writes `files`, counts its calls, remembers what it found in its folders, and fails
    where told to.
    """

    def __init__(
        self,
        files: dict[str, str] | None = None,
        result: dict[str, Any] | None = None,
        error: BaseException | None = None,
    ):
        self.files = files or {"model.safetensors": "weights"}
        self.result = result or {}
        self.error = error
        self.checkpoint = False
        self.calls = 0

    def __call__(self, output: Path, work: Path) -> dict[str, Any]:
        self.calls += 1
        self.found = {"output": sorted(os.listdir(output)), "work": sorted(os.listdir(work))}
        for name, text in self.files.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text(text)
        if self.checkpoint:
            (work / "checkpoint-1").write_text("half way")
        if self.error:
            raise self.error
        return self.result


def publish(
    config: Config,
    make: Make | None = None,
    *,
    kind: str = "policy",
    inputs: dict[str, Artifact] | None = None,
    log=print,
) -> Path:
    return build_artifact(config, kind=kind, inputs=inputs or {}, make=make or Make(), log=log)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def rewrite(file: Path, text: str) -> None:
    """Another content and a later mtime, whatever the clock's resolution."""
    later = file.stat().st_mtime_ns + 1_000_000_000
    file.write_text(text)
    os.utime(file, ns=(later, later))


def interrupt(config: Config, inputs: dict[str, Artifact] | None = None) -> Make:
    """A run of `config` that wrote a checkpoint and half of its output before Ctrl-C."""
    make = Make({"half.bin": "half"}, error=KeyboardInterrupt())
    make.checkpoint = True
    with pytest.raises(KeyboardInterrupt):
        publish(config, make, inputs=inputs)
    return make


def input_artifact(tmp_path: Path, rows: str) -> Artifact:
    """A records artifact; its rows differ, or not."""
    config = Config(runs=str(tmp_path / "upstream"), force=True)
    return require_artifact(
        publish(config, Make({"train/rows.jsonl": rows}), kind="records"), "records", "make prepare"
    )


def fail_at(monkeypatch, owner: Any, name: str, nth: int) -> None:
    """Let the nth call of `owner.name` from now on raise a full disk; the others go through."""
    original, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def refusal(path: Path, kind: str = "policy") -> str:
    with pytest.raises(UserError) as refused:
        require_artifact(path, kind, FIX)
    assert "\n" not in str(refused.value)
    return str(refused.value)
