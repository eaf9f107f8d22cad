"""Two processes: one artifact, written once. (`accelerate launch --cpu` starts one process, whatever it is told: torchrun it is.)"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from pipeline import artifact
from pipeline.config import RECIPES
from pipeline.ranks import agree, leave

ROOT = RECIPES.parent


def test_alone_one_agrees_with_oneself():
    assert agree("make") == "make"


def test_a_group_joined_is_left():
    leave()  # nothing to leave
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    leave()
    assert not distributed.is_initialized()


def launch(processes: int, stage: str, *arguments: str) -> str:
    """What a stage prints, run by so many processes."""
    alone = [sys.executable]
    launcher = alone if processes == 1 else [*alone, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, "-m", "pipeline", stage, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for attempt in (1, 2):  # torchrun picks a free port and then opens it: another process may come first
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            return done.stdout
        print(f"attempt {attempt}: {done.stderr}")
    pytest.fail(f"{stage} by {processes} processes failed twice: {done.stderr[-3000:]}")


@pytest.fixture(scope="module")
def launched(tiny_records, tmp_path_factory) -> tuple[Path, list[str]]:
    """sft by two processes, twice: the folder, and what each launch printed."""
    runs = tmp_path_factory.mktemp("runs")
    small = ["scratch={layers: 1, width: 16, heads: 2, vocabulary: 300}", "training.max_steps=2", "training.logging_steps=1"]
    stage = ["--config", str(RECIPES / "demo/sft.yaml"), "run=t", f"runs={runs}", f"records={tiny_records}", *small]
    return runs / "t" / "sft", [launch(2, "sft", *stage) for _ in range(2)]


def test_two_processes_train_together_and_one_writes(launched):
    folder, printed = launched
    artifact.verify(artifact.require(folder, "policy", "…"))
    assert printed[0].count("sft: ") == 1
    entries = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]


def test_what_is_unchanged_is_reused_by_all(launched):
    folder, printed = launched
    assert printed[1] == f"sft: {folder}\nsft: unchanged, reusing {folder}\n"


def test_two_processes_learn_what_one_does(tiny_feedback, tiny_llama, tmp_path):
    """Rankings, which share their prompts and go through a model with buffers in several forwards, here more than there: the same four
    a step."""
    logs = {}
    for processes in (1, 2):
        training = {"max_steps": 3, "per_device_train_batch_size": 4 // processes, "train_sampling_strategy": "sequential"}
        small = ["max_length=96", "training.logging_steps=1", "training.logging_strategy=steps", "training.eval_strategy=no"]
        small += [f"training.{key}={value}" for key, value in training.items()]
        given = [f"runs={tmp_path}", f"run=p{processes}", f"records={tiny_feedback}", f"model={tiny_llama}"]
        launch(processes, "reward", "--config", str(RECIPES / "gpt2-ranked/reward.yaml"), *given, *small)
        entries = map(json.loads, (tmp_path / f"p{processes}" / "reward" / "log.jsonl").open(encoding="utf-8"))
        logs[processes] = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(logs[1]) == 3
    assert logs[2] == pytest.approx(logs[1], abs=1e-5)
