"""What is published is whole or not there; what is unchanged is not made again; what was altered is found."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from pipeline.artifacts import files as files_module
from pipeline.artifacts import inputs as inputs_module
from pipeline.artifacts import replacing
from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import (
    artifact_status,
    inspect_artifact,
    open_external,
    require_artifact,
    verify_artifact,
)
from pipeline.artifacts.manifest import Artifact, read_manifest
from pipeline.artifacts.replacing import check_settings
from pipeline.artifacts.schema import manifest_digest
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


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(runs=str(tmp_path / "runs"))


@pytest.fixture
def said() -> list[str]:
    return []


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


# Building


def test_first_build_publishes_files_config_and_manifest(config, said):
    make = Make(
        {"model.safetensors": "weights", "tokenizer/vocab.txt": "a b"},
        {"metrics": {"loss": 0.25}, "rows": {"kept": 7}},
    )
    folder = publish(config, make, log=said.append)
    assert folder == Path(config.runs) / "demo" / "sft"
    assert make.found == {"output": [], "work": []}
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "config.yaml",
        "manifest.json",
        "model.safetensors",
        "tokenizer/vocab.txt",
    ]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.resolved()
    assert sorted(os.listdir(folder.parent)) == [".lock", "sft"]
    assert said == []


def test_manifest_holds_every_field(config, tmp_path):
    upstream = input_artifact(tmp_path, "rows")
    (tmp_path / "data.csv").write_text("prompt,completion\n")
    inputs = {
        "records": upstream,
        "data": open_external(tmp_path / "data.csv", "records"),
        "model": require_artifact("no-such-org/gpt2", "model", FIX),
    }
    config.seed = 3
    folder = publish(
        config,
        Make(result={"metrics": {"loss": 0.25}, "rows": {"kept": 7, "quarantined": {"empty": 1}}}),
        inputs=inputs,
    )
    manifest = manifest_of(folder)
    assert datetime.fromisoformat(manifest.pop("created_at")).utcoffset() == timedelta(0)
    versions = manifest.pop("versions")
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "trl", "datasets"} <= versions.keys()
    fingerprint = {
        "config": config.resolved(),
        "inputs": {name: item.identity for name, item in inputs.items()},
        "version": "0.4.0" if "pipeline" in versions else "not installed",
    }
    config_file = sha256((folder / "config.yaml").read_text())
    assert manifest == {
        "schema": 2,
        "kind": "policy",
        "stage": "sft",
        "seed": 3,
        "config_hash": sha256(json.dumps(config.resolved(), sort_keys=True)),
        "fingerprint": fingerprint,
        "inputs": {
            "records": {
                "path": upstream.path.as_posix(),
                "identity": upstream.identity,
                "manifest_hash": sha256((upstream.path / "manifest.json").read_text()),
            },
            "data": {
                "path": (tmp_path / "data.csv").as_posix(),
                "identity": inputs["data"].identity,
                "foreign": True,
                "files": {"data.csv": sha256("prompt,completion\n")},
            },
            "model": {
                "path": "no-such-org/gpt2",
                "identity": inputs["model"].identity,
                "foreign": True,
                "hub": "no-such-org/gpt2",
                "revision": None,
            },
        },
        "files": {"config.yaml": config_file, "model.safetensors": sha256("weights")},
        "rows": {"kept": 7, "quarantined": {"empty": 1}},
        "metrics": {"loss": 0.25},
        "identity": manifest["identity"],
        "digest": manifest["digest"],
    }
    assert manifest_of(folder)["digest"] == manifest_digest(manifest_of(folder))


def test_rows_and_metrics_may_be_left_out(config):
    manifest = manifest_of(publish(config, Make()))
    assert (manifest["rows"], manifest["metrics"]) == ({}, {})


def test_unknown_key_of_a_result_is_refused(config):
    with pytest.raises(
        ValueError, match=re.escape("sft: make returned ['loss'], expected no key but 'metrics' and 'rows'")
    ):
        publish(config, Make(result={"loss": 0.25, "rows": {}}))
    assert not config.folder.exists()


def test_unchanged_is_reused(config, said):
    folder = publish(config)
    before = (folder / "manifest.json").read_bytes()
    again = Make()
    assert publish(config, again, log=said.append) == folder
    assert again.calls == 0
    assert said == [f"sft: unchanged, reusing {folder}"]
    assert (folder / "manifest.json").read_bytes() == before


def test_a_finished_artifact_is_not_replaced_in_silence_when_a_setting_changes(config):
    folder = publish(config)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config.training["learning_rate"] = 0.25
    make = Make()
    with pytest.raises(UserError) as refused:
        publish(config, make)
    assert str(refused.value) == (
        f"{folder}: was made with other settings: training.learning_rate was 0.5, is 0.25; add --force to "
        "replace it, or keep it and choose another run: --run NAME"
    )
    with pytest.raises(UserError, match=r"training\.learning_rate was 0\.5, is 0\.25"):
        check_settings([config])  # before any stage of a recipe is run
    assert make.calls == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(os.listdir(folder.parent)) == [".lock", "sft"]
    config.run = "other"
    check_settings([config])
    publish(config, make)
    assert make.calls == 1


def test_the_revision_that_a_stage_resolves_is_no_change_before_it_is_resolved(config):
    config.training["revision"] = "c0ffee"
    publish(config)
    config.training["revision"] = None
    check_settings([config])
    with pytest.raises(UserError, match=r"training\.revision was c0ffee, is None"):
        publish(config)


def test_a_half_written_artifact_of_other_settings_is_not_replaced_either(config, said):
    folder = publish(config)
    (folder / "manifest.json").unlink()
    config.seed = 1
    with pytest.raises(UserError, match=r"demo/sft: was made with other settings: seed was 0, is 1"):
        publish(config)
    assert (folder / "model.safetensors").exists()
    config.seed = 0
    publish(config, log=said.append)
    assert said == [
        f"sft: {folder}: half-written (no valid manifest.json): its stage was interrupted; making it again"
    ]


def test_what_was_begun_with_force_is_resumed_without_it(config, said):
    publish(config)
    config.seed, config.force = 1, True
    interrupt(config)
    config.force = False
    check_settings([config])
    publish(config, log=said.append)
    assert said[-1] == f"sft: resuming {config.folder.parent / '.sft.partial'}"
    assert manifest_of(config.folder)["seed"] == 1


def test_changed_config_is_made_again_by_force(config):
    publish(config, Make({"model.safetensors": "old", "old.bin": "old"}))
    config.training["learning_rate"] = 0.25
    config.force = True
    folder = publish(config, Make({"model.safetensors": "new"}))
    assert sorted(os.listdir(folder)) == ["config.yaml", "manifest.json", "model.safetensors"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["learning_rate"] == 0.25
    assert sorted(os.listdir(folder.parent)) == [".lock", "sft"]


def test_changed_input_is_made_again_and_an_equal_one_is_not(config, tmp_path, said):
    old = input_artifact(tmp_path, "rows")
    publish(config, inputs={"records": old})
    same, other = Make(), Make()
    publish(config, same, inputs={"records": input_artifact(tmp_path, "rows")})
    new = input_artifact(tmp_path, "other rows")
    publish(config, other, inputs={"records": new}, log=said.append)
    assert (same.calls, other.calls) == (0, 1)
    assert said == [
        f"sft: {config.folder}: inputs.records was {old.identity}, is {new.identity}; making it again"
    ]


def test_a_release_that_changes_no_results_reuses_what_is_there(config, monkeypatch):
    publish(config)
    monkeypatch.setattr(replacing, "package_versions", lambda: {"pipeline": "99.0"})
    again = Make()
    assert manifest_of(publish(config, again))["fingerprint"]["version"] == "0.4.0"
    assert again.calls == 0


def test_the_results_of_another_version_are_not_replaced_in_silence(config, monkeypatch):
    publish(config)
    monkeypatch.setattr(replacing, "RESULTS_VERSION", "99.0")
    again = Make()
    message = r"demo/sft: has the results of version 0\.4\.0, and version 99\.0 computes others; add --force"
    with pytest.raises(UserError, match=message):
        publish(config, again)
    assert again.calls == 0
    config.force = True
    assert manifest_of(publish(config, again))["fingerprint"]["version"] == "99.0"
    assert again.calls == 1


def test_force_makes_it_again(config, said):
    publish(config, Make({"model.safetensors": "old"}))
    config.force = True
    folder = publish(config, Make({"model.safetensors": "new"}), log=said.append)
    assert (folder / "model.safetensors").read_text() == "new"
    assert said == []


def test_altered_artifact_is_made_again(config, said):
    folder = publish(config)
    rewrite(folder / "model.safetensors", "weightz")
    publish(config, Make(), log=said.append)
    assert (folder / "model.safetensors").read_text() == "weights"
    assert said == [
        f"sft: {folder}: model.safetensors was altered: its SHA-256 is {sha256('weightz')[:12]}…, "
        f"expected {sha256('weights')[:12]}…; making it again"
    ]


@pytest.mark.parametrize("name", ["notes.txt", "adapter_config.json", "best/notes.txt", "link"])
def test_a_visible_file_added_to_what_was_published_is_refused_and_not_lost(config, name):
    folder = publish(config, Make({"model.safetensors": "w", "best/config.json": "{}"}))
    if name == "link":
        (folder / name).symlink_to(folder.parent)  # a folder
    else:
        (folder / name).write_text("learned at last")
    with pytest.raises(UserError, match=rf"demo/sft: contains files that no stage wrote \({name}\)"):
        publish(config)
    message = f"contains {name}, which its manifest.json does not list and a library could load: move it away"
    assert refusal(folder) == f"{folder}: {message}; run: {FIX}"
    assert refusal(folder / "best") == f"{folder / 'best'}: is a part of {folder}: {message}; run: {FIX}"
    assert artifact_status(folder) == ("altered", message)
    assert os.path.lexists(folder / name)
    config.force = True
    publish(config)
    assert not os.path.lexists(folder / name)


def test_hidden_files_are_the_users(config, tmp_path, said):
    publish(config, inputs={"records": input_artifact(tmp_path, "rows")})
    folder = config.folder
    (folder / ".notes").write_text("mine")
    require_artifact(folder, "policy", FIX)
    verify_artifact(require_artifact(folder, "policy", FIX))
    publish(config, inputs={"records": input_artifact(tmp_path, "rows")}, log=said.append)
    assert said == [f"sft: unchanged, reusing {folder}"]
    refused = r"demo/sft: contains files that no stage wrote \(.notes\); move them away, or add --force"
    other = {"records": input_artifact(tmp_path, "other rows")}
    with pytest.raises(UserError, match=refused):
        publish(config, inputs=other)
    rewrite(folder / "model.safetensors", "altered")
    with pytest.raises(UserError, match=refused):
        publish(config, inputs={"records": input_artifact(tmp_path, "rows")})
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=refused):
        publish(config, inputs=other)
    assert (folder / ".notes").read_text() == "mine"
    config.force = True
    publish(config, inputs=other)
    assert not (folder / ".notes").exists()


def test_what_datasets_caches_beside_records_is_no_fault(config):
    folder = publish(config, Make({"comparisons/train/data.arrow": "rows"}), kind="records")
    (folder / "comparisons" / "train" / "cache-0123456789abcdef.arrow").write_text("mapped")
    verify_artifact(require_artifact(folder, "records", FIX))


def test_a_model_without_weights_is_no_model(config):
    folder = publish(config, Make({"config.json": "{}", "value_head.safetensors": "h"}))
    assert refusal(folder) == (
        f"{folder}: manifest.json lists no weights (*.safetensors, *.bin): it is no model; run: {FIX}"
    )


def test_an_altered_manifest_is_refused(config):
    folder = publish(config)
    manifest = manifest_of(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"identity": "f" * 64}))
    assert "manifest.json was altered: its identity is not that of its files" in refusal(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": [], "schema": "1"}))
    assert "manifest.json was altered: schema: Input should be a valid integer" in refusal(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"metrics": {"loss": 0.0}}))
    assert "manifest.json was altered: its digest is not that of its content" in refusal(folder)
    assert read_manifest(folder) == {}


def test_files_that_no_stage_wrote_are_not_replaced_unless_forced(config):
    config.folder.mkdir(parents=True)
    (config.folder / "thesis.txt").write_text("years of work")
    make = Make()
    with pytest.raises(
        UserError,
        match=r"demo/sft: contains files that no stage wrote \(thesis.txt\); move them away, or add --force",
    ):
        publish(config, make)
    assert (make.calls, (config.folder / "thesis.txt").read_text()) == (0, "years of work")
    config.force = True
    assert sorted(os.listdir(publish(config, make))) == ["config.yaml", "manifest.json", "model.safetensors"]


# Interruption


def test_interrupted_run_resumes_with_its_work_and_an_empty_output(config, said):
    interrupt(config)
    assert not config.folder.exists()
    make = Make()
    folder = publish(config, make, log=said.append)
    assert make.found == {"output": [], "work": ["checkpoint-1"]}
    assert said == [f"sft: resuming {folder.parent / '.sft.partial'}"]
    assert sorted(os.listdir(folder)) == ["config.yaml", "manifest.json", "model.safetensors"]
    assert sorted(os.listdir(folder.parent)) == [".lock", "sft"]


def test_interrupted_before_a_checkpoint_starts_afresh_even_with_another_config(config, said):
    with pytest.raises(KeyboardInterrupt):
        publish(config, Make({"half.bin": "half"}, error=KeyboardInterrupt()))
    config.training["learning_rate"] = 0.25
    make = Make()
    publish(config, make, log=said.append)
    assert (make.found, said) == ({"output": [], "work": []}, [])


@pytest.mark.parametrize("text", ['{"config": ', "[" * 100_000, '{"config": {}, "inputs": [], "version": 3}'])
def test_work_of_unknown_origin_is_not_resumed(config, said, text):
    interrupt(config)
    partial = config.folder.parent / ".sft.partial"
    (partial / "fingerprint.json").write_text(text)
    make = Make()
    publish(config, make, log=said.append)
    assert make.found == {"output": [], "work": []}
    assert said == [f"sft: {partial}: fingerprint.json is not valid; starting over"]


def test_changed_config_over_a_partial_run_is_refused_with_keys_and_values(config):
    interrupt(config)
    config.training = {"learning_rate": 0.25, "steps": [1, 3], "warmup": 4}
    make = Make()
    with pytest.raises(UserError) as refused:
        publish(config, make)
    assert str(refused.value) == (
        f"{config.folder.parent / '.sft.partial'}: interrupted with other settings: "
        f"training.learning_rate was 0.5, is 0.25, "
        "training.steps.1 was 2, is 3, training.warmup was not set, is 4; "
        "set them back to resume, or add --force to start over"
    )
    assert make.calls == 0
    config.training = {"learning_rate": 0.5, "steps": [1, 2]}
    publish(config, make)
    assert make.found["work"] == ["checkpoint-1"]


def test_changed_input_over_a_partial_run_is_refused(config, tmp_path):
    old = input_artifact(tmp_path, "rows")
    interrupt(config, inputs={"records": old})
    new = input_artifact(tmp_path, "other rows")
    with pytest.raises(UserError, match=f"inputs.records was {old.identity}, is {new.identity}"):
        publish(config, inputs={"records": new})


def test_force_over_a_partial_run_starts_afresh(config, said):
    interrupt(config)
    config.training["learning_rate"] = 0.25
    config.force = True
    make = Make()
    publish(config, make, log=said.append)
    assert (make.found, said) == ({"output": [], "work": []}, [])


def test_reuse_leaves_the_partial_run_of_another_config_alone(config):
    publish(config)
    config.training["learning_rate"] = 0.25
    config.force = True
    interrupt(config)
    config.force = False
    config.training["learning_rate"] = 0.5
    again = Make()
    publish(config, again)
    config.training["learning_rate"] = 0.25
    resumed = Make()
    publish(config, resumed)
    assert (again.calls, resumed.found["work"]) == (0, ["checkpoint-1"])


@pytest.mark.parametrize(
    "error", [RuntimeError("diverged"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_failed_make_passes_through_and_leaves_the_published_valid(config, error):
    folder = publish(config, Make({"model.safetensors": "good"}))
    config.training["learning_rate"] = 0.25
    config.force = True
    with pytest.raises(type(error)) as raised:
        publish(config, Make({"model.safetensors": "bad"}, error=error))
    assert raised.value is error
    verify_artifact(require_artifact(folder, "policy", FIX))
    assert (folder / "model.safetensors").read_text() == "good"
    config.training["learning_rate"] = 0.5
    config.force = False
    again = Make()
    publish(config, again)
    assert again.calls == 0


def fail_at(monkeypatch, owner: Any, name: str, nth: int) -> None:
    """Let the nth call of `owner.name` from now on raise a full disk; the others go through."""
    original, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_an_error_between_the_two_renames_brings_the_previous_artifact_back(config, monkeypatch):
    folder = publish(config, Make({"model.safetensors": "old"}))
    config.force = True
    fail_at(monkeypatch, os, "rename", 2)
    with pytest.raises(OSError, match="No space"):
        publish(config, Make({"model.safetensors": "new"}))
    assert (folder / "model.safetensors").read_text() == "old"
    require_artifact(folder, "policy", FIX)


def test_crash_between_the_two_renames_is_repaired(config, monkeypatch):
    folder = publish(config, Make({"model.safetensors": "old"}))
    identity = manifest_of(folder)["identity"]
    config.training["learning_rate"] = 0.25
    config.force = True
    with monkeypatch.context() as patch:
        renames, rename = [], os.rename

        def rename_once(*paths):
            renames.append(paths)
            if len(renames) == 2:
                raise KeyboardInterrupt
            rename(*paths)

        patch.setattr(os, "rename", rename_once)
        with pytest.raises(KeyboardInterrupt):
            publish(config, Make({"model.safetensors": "new"}))
    assert sorted(os.listdir(folder.parent)) == [".lock", ".sft.partial"]
    assert sorted(os.listdir(folder.parent / ".sft.partial")) == ["fingerprint.json", "old", "output", "work"]
    with pytest.raises(UserError, match="demo/sft: half-written .*; run: " + re.escape(FIX)):
        require_artifact(folder, "policy", FIX)

    config.training["learning_rate"] = 0.5
    config.force = False
    again = Make()
    publish(config, again)
    assert (again.calls, manifest_of(folder)["identity"], (folder / "model.safetensors").read_text()) == (
        0,
        identity,
        "old",
    )
    config.training["learning_rate"] = 0.25
    config.force = True
    publish(config, Make({"model.safetensors": "new"}))
    assert (folder / "model.safetensors").read_text() == "new"
    assert sorted(os.listdir(folder.parent)) == [".lock", "sft"]


def kill_in_the_clean_up(monkeypatch, config: Config, stop: int) -> bool:
    """Publish a replacement; stop before the nth deletion after that. Return whether there was one."""
    real, calls = {name: getattr(os, name) for name in ("unlink", "rmdir")}, []

    def patched(name: str):
        def call(path, **kwargs):
            calls.extend([path] * ((config.folder / "model.safetensors").read_text() == "new"))
            if len(calls) == stop:
                raise KeyboardInterrupt
            return real[name](path, **kwargs)

        return call

    checkpointed = Make({"model.safetensors": "new", "sub/vocab.txt": "a b"})
    checkpointed.checkpoint = True
    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, patched(name))
        try:
            publish(config, checkpointed)
        except KeyboardInterrupt:
            return True
    return False


def test_a_kill_at_any_point_of_the_clean_up_leaves_nothing_for_good(tmp_path, monkeypatch):
    kills = 0
    for stop in range(1, 100):
        config = Config(runs=str(tmp_path / str(stop)))
        publish(config, Make({"model.safetensors": "old", "sub/vocab.txt": "a"}))
        config.training["learning_rate"], config.force = 0.25, True
        if not kill_in_the_clean_up(monkeypatch, config, stop):
            break
        kills += 1
        config.force = False
        again = Make()
        folder = publish(config, again)
        assert (again.calls, (folder / "model.safetensors").read_text()) == (0, "new")
        assert sorted(os.listdir(folder.parent)) == [".lock", "sft"]
        verify_artifact(require_artifact(folder, "policy", FIX))
    assert kills > 8


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [(os, "rename", nth) for nth in (1, 2)]
    + [(os, "fsync", nth) for nth in (1, 2, 3)]
    + [(Path, "write_text", nth) for nth in (1, 3, 4)],
)
def test_full_disk_while_publishing_loses_nothing(config, monkeypatch, owner, name, nth):
    folder = publish(config, Make({"model.safetensors": "old"}))
    require_artifact(folder, "policy", FIX)
    config.training["learning_rate"] = 0.25
    config.force = True
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, nth)
        with pytest.raises(OSError, match="No space left on device"):
            publish(config, Make({"model.safetensors": "new"}))
    config.training["learning_rate"] = 0.5
    config.force = False
    again = Make()
    publish(config, again)
    verify_artifact(require_artifact(folder, "policy", FIX))
    assert (again.calls, (folder / "model.safetensors").read_text()) == (0, "old")
    config.training["learning_rate"] = 0.25
    config.force = True
    assert (publish(config, Make({"model.safetensors": "new"})) / "model.safetensors").read_text() == "new"


# What somebody else made first


@pytest.mark.parametrize(
    "place", ["demo", "demo/sft", "demo/.sft.partial", "demo/.sft.partial/work", "demo/.lock"]
)
@pytest.mark.parametrize("force", [False, True])
def test_a_symbolic_link_is_refused_and_what_it_leads_to_is_left_alone(config, tmp_path, place, force):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    link = Path(config.runs) / place
    link.parent.mkdir(parents=True)
    link.symlink_to(theirs / "thesis.txt" if place.endswith("lock") else theirs)
    config.force = force
    make = Make()
    with pytest.raises(UserError, match=re.escape(str(Path(config.runs) / place.removesuffix("/work")))):
        publish(config, make)
    assert (make.calls, link.is_symlink(), os.listdir(theirs)) == (0, True, ["thesis.txt"])
    assert (theirs / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "name", [".sft.partial", ".sft.partial/notes.txt", ".sft.partial/work/notes.txt", ".lock"]
)
def test_a_temporary_name_that_somebody_made_first_is_left_alone(config, name):
    file = config.folder.parent / name
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    make = Make()
    with pytest.raises(UserError, match=r"move it away"):
        publish(config, make)
    assert (make.calls, file.read_text()) == (0, "years of work")
    if name != ".lock":
        config.force = True
        publish(config, make)
        assert sorted(os.listdir(config.folder.parent)) == [".lock", "sft"]


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O")]
)
@pytest.mark.parametrize("name", ["manifest.json", "sub"])
def test_what_cannot_be_read_for_now_is_not_taken_for_absent(config, monkeypatch, error, name):
    folder = publish(config, Make({"model.safetensors": "w", "sub/vocab.txt": "a"}))
    real_open, real_scandir = open, os.scandir

    def refuse(real):
        def call(path, *args, **kwargs):
            if isinstance(path, str | Path) and Path(path).name == name:
                error.filename = str(path)
                raise error
            return real(path, *args, **kwargs)

        return call

    make = Make()
    with monkeypatch.context() as patch:
        patch.setattr("io.open", refuse(real_open))
        patch.setattr(os, "scandir", refuse(real_scandir))
        for look in (
            lambda: publish(config, make),
            lambda: require_artifact(folder, "policy", FIX),
            lambda: artifact_status(folder),
        ):
            with pytest.raises(OSError, match=error.strerror):
                look()
    assert make.calls == 0
    verify_artifact(require_artifact(folder, "policy", FIX))


# One writer at a time


def test_second_process_is_refused_until_the_first_dies(config):
    folder = config.folder
    holder = f"""
import sys
from filelock import FileLock
lock = FileLock({str(folder.parent / ".lock")!r})
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""
    folder.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        make = Make()
        with pytest.raises(UserError, match="runs/demo is being written by another process"):
            publish(config, make)
        assert make.calls == 0
        process.kill()
        process.wait()
    publish(config, make)
    assert make.calls == 1


def test_lock_is_held_while_making_and_let_go_after_a_failure(config):
    def make(output: Path, work: Path) -> dict[str, Any]:
        with pytest.raises(UserError, match="is being written by another process"):
            publish(config)
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        build_artifact(config, kind="policy", inputs={}, make=make)
    publish(config)


@pytest.mark.parametrize(
    ("decision", "on_every_rank", "calls", "waits"),
    [(True, True, 1, 2), (True, False, 0, 2), (False, True, 0, 1)],
)
def test_other_ranks_do_what_rank_0_decides_and_wait_for_it(
    config, monkeypatch, decision, on_every_rank, calls, waits
):
    waited: list[Any] = []
    monkeypatch.setattr(
        "pipeline.distributed.processes.broadcast", lambda value: (waited.append(value), (False, decision))[1]
    )
    monkeypatch.setenv("RANK", "1")
    made: list[Path] = []
    folder = build_artifact(
        config,
        kind="policy",
        inputs={},
        make=lambda *folders: made.append(folders),
        on_every_rank=on_every_rank,
    )
    assert (folder, len(made), len(waited)) == (config.folder, calls, waits)
    assert not config.folder.parent.exists()


def test_where_rank_0_fails_the_others_leave(config, monkeypatch):
    monkeypatch.setattr("pipeline.distributed.processes.broadcast", lambda value: (True, None))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        build_artifact(config, kind="policy", inputs={}, make=Make())
    assert left.value.code == 2


def test_rank_0_tells_the_others_what_it_decides(config, monkeypatch):
    told: list[Any] = []
    monkeypatch.setattr(
        "pipeline.distributed.processes.broadcast", lambda value: (told.append(value), value)[1]
    )
    publish(config)
    publish(config)
    assert told == [(False, True), (False, None), (False, False)]  # make it; it is published; it is there
    config.training["steps"] = [3]
    config.force = True
    interrupt(config)
    config.force = False
    del told[:]
    config.training["steps"] = [4]
    with pytest.raises(UserError, match="was made with other settings"):
        publish(config)
    assert told == [(True, None)]


@pytest.mark.parametrize("when", ["hashed", "listed"])
def test_a_look_beside_a_writer_never_says_altered(config, monkeypatch, when):
    folder = publish(config)
    config.seed, config.force = 1, True
    name = {"hashed": "hash_files", "listed": "list_names"}[when]
    original, calls = getattr(inputs_module, name), []

    def replaced_meanwhile(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) in (1, 2):  # the manifest was read before, and the files are read after
            config.seed += 1
            publish(config, Make({"model.safetensors": f"of {config.seed}"}))
        return original(*args, **kwargs)

    for look in (
        lambda: artifact_status(folder),
        lambda: require_artifact(folder, "policy", FIX) and ("done", ""),
        lambda: inspect_artifact(folder, cached=False)[1] or ("done", ""),
    ):
        del calls[:]
        with monkeypatch.context() as patch:
            patch.setattr(inputs_module, name, replaced_meanwhile)
            assert look() == ("done", "")
        assert len(calls) >= 3


def test_an_input_whose_manifest_has_changed_is_told(config, tmp_path):
    records = input_artifact(tmp_path, "rows")
    folder = publish(config, inputs={"records": records})
    assert artifact_status(folder) == ("done", "")
    manifest = manifest_of(records.path) | {"metrics": {"accuracy": 1.0}}
    manifest["digest"] = manifest_digest(manifest)
    (records.path / "manifest.json").write_text(json.dumps(manifest))  # a forger knows the digest
    assert artifact_status(folder) == (
        "done",
        "the manifest.json of its input records has changed since, and its content has not",
    )


def test_what_was_served_is_out_of_date_when_what_it_reads_is_another(config, tmp_path):
    read = input_artifact(tmp_path, "a")
    served = Artifact(
        read.path,
        read.manifest | {"served": {"url": "http://gpu7"}, "reads": read.identity, "identity": "f" * 64},
    )
    folder = publish(config, inputs={"reward_0": served})
    assert artifact_status(folder) == ("done", "")
    input_artifact(tmp_path, "b")
    assert artifact_status(folder)[0] == "out of date"


# Opening an input


def test_require_opens_what_build_published(config):
    folder = publish(config)
    opened = require_artifact(str(folder), "policy", FIX)
    assert opened == Artifact(folder, manifest_of(folder))
    assert (opened.identity, opened.is_external) == (manifest_of(folder)["identity"], False)


def refusal(path: Path, kind: str = "policy") -> str:
    with pytest.raises(UserError) as refused:
        require_artifact(path, kind, FIX)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_missing_artifact_names_path_and_fix(config):
    assert refusal(config.folder) == f"{config.folder}: does not exist; run: {FIX}"


def test_half_written_artifact_is_refused(config):
    message = f"{config.folder}: half-written (no valid manifest.json): its stage was interrupted; run: {FIX}"
    interrupt(config)
    assert refusal(config.folder) == message  # only .sft.partial is there
    folder = publish(config)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest[: len(manifest) // 2])
    assert refusal(config.folder) == message
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text("{}")  # looks foreign, but config.yaml says that a stage wrote it
    assert refusal(config.folder) == message
    publish(config)
    verify_artifact(require_artifact(folder, "policy", FIX))


def test_changed_byte_is_found_by_name(config):
    folder = publish(config, Make({"model.safetensors": "weights", "sub/vocab.txt": "a b"}))
    rewrite(folder / "sub/vocab.txt", "a c")
    assert refusal(folder) == (
        f"{folder}: sub/vocab.txt was altered: its SHA-256 is {sha256('a c')[:12]}…, expected "
        f"{sha256('a b')[:12]}…; run: {FIX}"
    )


def test_removed_file_is_found_by_name(config):
    folder = publish(config)
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder}: model.safetensors is missing; run: {FIX}"


def test_wrong_kind_is_refused_and_any_checkpoint_is_a_model(config):
    folder = publish(config)
    assert refusal(folder, "reward") == f"{folder}: is of kind 'policy', expected 'reward'; run: {FIX}"
    assert require_artifact(folder, "model", FIX).manifest["kind"] == "policy"
    config.run = "other"
    records = publish(config, kind="records")
    assert refusal(records, "model") == f"{records}: is of kind 'records', expected 'model'; run: {FIX}"


def test_newer_schema_is_refused(config):
    folder = publish(config)
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {"schema": 3}))
    problem = "written by a newer version (schema 3, this one reads 2): upgrade, or make it again"
    assert refusal(folder) == f"{folder}: {problem}; run: {FIX}"
    with pytest.raises(UserError, match=re.escape(f"{folder}: {problem} with --force")):
        publish(config)


def test_folder_of_something_else_is_refused(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}: is not an artifact of kind 'policy': expected one of manifest.json, "
        f"config.json, adapter_config.json in it; run: {FIX}"
    )


@pytest.mark.parametrize(
    ("marker", "kind", "other"),
    [
        ("config.json", "policy", "records"),
        ("adapter_config.json", "reward", "records"),
        ("config.json", "model", "evaluation"),
        ("dataset_dict.json", "records", "policy"),
        ("dataset_info.json", "records", "model"),
    ],
)
def test_foreign_folder_is_accepted_with_hashes(tmp_path, marker, kind, other):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / marker).write_text("{}")
    (folder / "weights").write_text("w")
    (folder / "manifest.json").write_text('{"of": "another tool"}')
    opened = require_artifact(folder, kind, FIX)
    assert (opened.path, opened.is_external, opened.manifest["kind"]) == (folder, True, kind)
    assert opened.manifest["files"] == {
        marker: sha256("{}"),
        "weights": sha256("w"),
        "manifest.json": sha256('{"of": "another tool"}'),
    }
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_text("changes with every fetch")
    assert require_artifact(folder, kind, FIX).identity == opened.identity
    rewrite(folder / "weights", "v")
    assert require_artifact(folder, kind, FIX).identity != opened.identity
    assert f"is not an artifact of kind '{other}'" in refusal(folder, other)


def test_foreign_file_counts_whatever_its_name(tmp_path):
    source = tmp_path / "log.jsonl"
    source.write_text("rows")
    opened = open_external(source, "records")
    assert opened.manifest["files"] == {"log.jsonl": sha256("rows")}
    rewrite(source, "more rows")
    assert open_external(source, "records").identity != opened.identity
    with pytest.raises(UserError, match=r"nowhere\.csv: does not exist; expected a file or a folder"):
        open_external(tmp_path / "nowhere.csv", "records")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, and a working folder without a local model in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize("hub_id", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_id_is_accepted_for_a_model_and_not_for_records(hub_cache, hub_id):
    opened = require_artifact(hub_id, "model", FIX)
    assert (opened.is_external, str(opened.path), opened.manifest["hub"], opened.revision) == (
        True,
        hub_id,
        hub_id,
        None,
    )
    assert refusal(Path(hub_id), "records") == f"{hub_id}: does not exist; run: {FIX}"
    refs = hub_cache / f"models--{hub_id.replace('/', '--')}" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("c0ffee")
    fetched = require_artifact(hub_id, "model", FIX)
    assert fetched.revision == "c0ffee"
    assert fetched.identity != opened.identity
    assert require_artifact(hub_id, "model", FIX) == fetched
    assert require_artifact(hub_id, "model", FIX, revision="v1").revision == "v1"


@pytest.mark.parametrize(
    "path", ["./gpt2", "/gpt2", "runs/demo", "runs/demo/sft", "models/smollm2", "a//b", "../gpt2"]
)
def test_path_is_not_taken_for_a_hub_id(hub_cache, path):
    Path("models").mkdir()
    with pytest.raises(UserError, match="does not exist"):
        require_artifact(path, "model", FIX)


def test_local_folder_wins_over_a_hub_id(hub_cache):
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text("{}")
    assert require_artifact("gpt2", "model", FIX).manifest["files"] == {"config.json": sha256("{}")}


# Identity


def identity(tmp_path: Path, run: str, files: dict[str, str], kind: str = "policy", **settings: Any) -> str:
    config = Config(runs=str(tmp_path / "runs"), run=run, **settings)
    return require_artifact(publish(config, Make(files), kind=kind), kind, FIX).identity


TALK = [
    "README.md",
    "report.html",
    "summary.md",
    "log.jsonl",
    "metrics.json",
    "training_args.bin",
    "sub/README.md",
]


def test_the_identity_of_an_evaluation_is_its_metrics(tmp_path):
    first, same, other = (
        identity(tmp_path, run, {"metrics.json": metrics, "report.html": run}, kind="evaluation")
        for run, metrics in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert first == same != other


def test_identity_is_content_only(tmp_path):
    files = {"model.safetensors": "weights", **dict.fromkeys(TALK, "some")}
    expected = identity(tmp_path, "a", files)
    assert expected == sha256(json.dumps(["policy", [["model.safetensors", sha256("weights")]]]))
    assert identity(tmp_path / "elsewhere", "b", files, seed=7) == expected
    assert (
        identity(tmp_path, "c", {"model.safetensors": "weights", **dict.fromkeys(TALK, "other")}) == expected
    )
    assert identity(tmp_path, "d", {"model.safetensors": "weights"}) == expected
    os.utime(tmp_path / "runs/a/sft/model.safetensors", (0, 0))
    assert require_artifact(tmp_path / "runs/a/sft", "policy", FIX).identity == expected


def test_identity_changes_with_content_name_and_kind(tmp_path):
    identities = [
        identity(tmp_path, "a", {"model.safetensors": "weights"}),
        identity(tmp_path, "b", {"model.safetensors": "weightz"}),
        identity(tmp_path, "c", {"other.bin": "weights"}),
        identity(tmp_path, "d", {"model.safetensors": "weights", "sub/vocab.txt": "a"}),
        identity(tmp_path, "e", {"model.safetensors": "weights"}, kind="reward"),
    ]
    assert len(set(identities)) == 5


def test_verify_accepts_what_is_sound(config, hub_cache):
    verify_artifact(require_artifact(publish(config), "policy", FIX))
    verify_artifact(require_artifact("gpt2", "model", FIX))


@pytest.mark.parametrize("small", [0, 2**20])
def test_other_bytes_of_the_same_size_and_time_are_seen(config, monkeypatch, small):
    monkeypatch.setattr(files_module, "SMALL", small)
    monkeypatch.setattr(files_module, "SETTLED", 0)
    folder = publish(config)
    opened = require_artifact(folder, "policy", FIX)
    stat = (folder / "model.safetensors").stat()
    (folder / "model.safetensors").write_text("weightz")
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "model.safetensors was altered" in refusal(folder)
    with pytest.raises(UserError, match=r"demo/sft: model\.safetensors was altered"):
        verify_artifact(opened)


def test_nothing_heavy_is_imported():
    code = (
        "import sys, pipeline.artifacts.build, pipeline.artifacts.inputs; print(sorted({'torch', "
        "'transformers', 'datasets', 'huggingface_hub'} & sys.modules.keys()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
