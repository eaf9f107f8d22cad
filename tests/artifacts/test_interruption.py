"""An interrupted run resumes, and a failure or a kill at any point loses nothing."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from pipeline.artifacts.inputs import (
    require_artifact,
    verify_artifact,
)
from pipeline.errors import UserError
from tests.artifacts.making import (
    FIX,
    Config,
    Make,
    fail_at,
    input_artifact,
    interrupt,
    manifest_of,
    publish,
)


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
