"""What is unchanged is reused, what is finished is not replaced in silence, what was altered is found."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import replacing
from pipeline.artifacts.inputs import (
    artifact_status,
    open_external,
    require_artifact,
    verify_artifact,
)
from pipeline.artifacts.manifest import read_manifest
from pipeline.artifacts.replacing import check_settings
from pipeline.artifacts.schema import manifest_digest
from pipeline.errors import UserError
from tests.artifacts.making import (
    FIX,
    Make,
    input_artifact,
    interrupt,
    manifest_of,
    publish,
    refusal,
    rewrite,
    sha256,
)


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
        "version": "0.5.0" if "pipeline" in versions else "not installed",
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
    assert manifest_of(publish(config, again))["fingerprint"]["version"] == "0.5.0"
    assert again.calls == 0


def test_the_results_of_another_version_are_not_replaced_in_silence(config, monkeypatch):
    publish(config)
    monkeypatch.setattr(replacing, "RESULTS_VERSION", "99.0")
    again = Make()
    message = r"demo/sft: has the results of version 0\.5\.0, and version 99\.0 computes others; add --force"
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
