"""`rlhf show` tells what an artifact is, and finds what was altered."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline import artifact
from pipeline.cli import main


def test_sections_and_values(tiny_records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = artifact.read_manifest(tiny_records)
    assert main(["show", str(tiny_records), "--verify"]) == 0
    first, inputs, rows, metrics, versions = capsys.readouterr().out.rstrip().split("\n\n")
    (name,) = manifest["inputs"]
    assert first.splitlines() == [
        str(tiny_records),
        "  kind        records",
        "  stage       prepare",
        "  seed        0",
        f"  created_at  {manifest['created_at']}",
        f"  identity    {manifest['identity']}",
        f"  files       {len(manifest['files'])}, read again, none altered",
    ]
    assert inputs == f"inputs\n  {name}  {name}  {manifest['inputs'][name]['identity']}"
    assert rows.splitlines()[1].split() == ["read", "135"]
    assert metrics.splitlines()[1].split() == ["comparisons.train", str(manifest["metrics"]["comparisons.train"])]
    assert versions.splitlines()[1].split() == ["python", manifest["versions"]["python"]]


def test_verify_finds_what_size_and_time_hide(tiny_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(tiny_records, tmp_path / "prepare")
    assert main(["show", str(folder)]) == 0
    file = folder / "config.yaml"
    stat = file.stat()
    file.write_bytes(b"#" + file.read_bytes()[1:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert main(["show", str(folder)]) == 0
    assert main(["show", str(folder), "--verify"]) == 2
    assert f"{folder}: config.yaml was altered" in capsys.readouterr().err


def test_a_run_and_a_missing_folder_are_told_apart(tiny_records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_records.parent
    assert main(["show", str(run)]) == 2
    assert f"{run}: is a run; name one of {tiny_records}; expected" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "none")]) == 2
    assert f"{tmp_path}/none: does not exist; expected" in capsys.readouterr().err


def test_what_is_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: holds no manifest.json of ours; expected a folder that a stage wrote, such as runs/demo/reward\n"
    )
