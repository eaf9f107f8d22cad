"""Two processes under `accelerate launch`: one artifact, written once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import artifact
from pipeline.config import RECIPES
from pipeline.ranks import agree

ROOT = RECIPES.parent


def test_alone_one_agrees_with_oneself():
    assert agree("make") == "make"


@pytest.fixture(scope="module")
def launched(tiny_records, tmp_path_factory) -> tuple[Path, list[str]]:
    """sft by two processes, twice: the folder, and what each launch printed."""
    runs = tmp_path_factory.mktemp("runs")
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    stage = ["pipeline", "sft", "--config", str(RECIPES / "demo/sft.yaml"), "--run", "t", f"runs={runs}", f"records={tiny_records}"]
    small = ["scratch={layers: 1, width: 16, heads: 2, vocabulary: 300}", "training.max_steps=2", "training.logging_steps=1"]
    command = [sys.executable, "-m", *launcher, "-m", *stage, *small]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    return runs / "t" / "sft", printed


def test_two_processes_train_together_and_one_writes(launched):
    folder, printed = launched
    artifact.verify(artifact.require(folder, "policy", "…"))
    assert printed[0].count("sft: ") == 1
    entries = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]


def test_what_is_unchanged_is_reused_by_all(launched):
    folder, printed = launched
    assert printed[1] == f"sft: {folder}\nsft: unchanged, reusing {folder}\n"
