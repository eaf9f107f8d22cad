"""An input is opened if it is whole and of the right kind; its identity is its content."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import files as files_module
from pipeline.artifacts.inputs import (
    open_external,
    require_artifact,
    verify_artifact,
)
from pipeline.artifacts.manifest import Artifact
from pipeline.errors import UserError
from tests.artifacts.making import (
    FIX,
    Config,
    Make,
    interrupt,
    manifest_of,
    publish,
    refusal,
    rewrite,
    sha256,
)

# Opening an input


def test_require_opens_what_build_published(config):
    folder = publish(config)
    opened = require_artifact(str(folder), "policy", FIX)
    assert opened == Artifact(folder, manifest_of(folder))
    assert (opened.identity, opened.is_external) == (manifest_of(folder)["identity"], False)


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
