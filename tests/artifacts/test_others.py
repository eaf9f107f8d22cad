"""Links, files and processes of others: nothing of theirs is lost, and one process writes at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import inputs as inputs_module
from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import (
    artifact_status,
    inspect_artifact,
    require_artifact,
    verify_artifact,
)
from pipeline.artifacts.manifest import Artifact
from pipeline.artifacts.schema import manifest_digest
from pipeline.errors import UserError
from tests.artifacts.making import (
    FIX,
    Make,
    input_artifact,
    interrupt,
    manifest_of,
    publish,
)

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
