"""scripts/slurm.sh with stand-ins for Slurm's commands: what sbatch gets and what each node starts."""

import os
import subprocess

import pytest

from pipeline.config import RECIPES

SCRIPT = RECIPES.parent / "scripts/slurm.sh"
STUBS = {  # stand-ins for the commands of a cluster
    "sbatch": 'echo "$STAGE $*" >> submitted; echo "$((100 + $(wc -l < submitted)));cluster"',
    "scontrol": "echo node1; echo node2",
    "srun": 'while [ "$1" != bash ]; do shift; done; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
    ".venv/bin/accelerate": 'echo "$*" >> launched',
}


@pytest.fixture
def cluster(tmp_path):
    """Return a function that runs the script and returns the lines of a file that the stubs wrote."""
    for name, body in STUBS.items():
        stub = tmp_path / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
        stub.chmod(0o755)

    def run(*arguments, output, **variables):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        subprocess.run(["bash", str(SCRIPT), *arguments], cwd=tmp_path, env=environment, check=True)
        return (tmp_path / output).read_text().splitlines()

    return run


def test_each_stage_waits_for_the_one_before_it(cluster):
    jobs = cluster("--partition=gpu", output="submitted", RECIPE="qwen-0.5b", GPUS="4")
    options = (
        "--parsable --nodes=2 --gpus-per-node=4 --job-name=qwen-0.5b-{0} "
        "--output=runs/slurm/%x-%j.log {1}--export=ALL --partition=gpu"
    )
    stages = ["prepare", "sft", "reward", "ppo", "evaluate"]
    for number, (stage, job) in enumerate(zip(stages, jobs, strict=True)):
        after = f"--dependency=afterok:{100 + number} --kill-on-invalid-dep=yes " if number else ""
        assert job == f"{stage} {options.format(stage, after)} {SCRIPT}"


def test_each_node_starts_its_processes(cluster):
    job = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    nodes = cluster(
        output="launched", STAGE="ppo", RECIPE="llama-8b-fsdp", LAUNCH="fsdp2", RUN="mine", GPUS="8", **job
    )
    for rank, node in enumerate(nodes):
        assert node == (
            "launch --config_file configs/accelerate/fsdp2.yaml "
            f"--num_machines 2 --num_processes 16 --machine_rank {rank} "
            "--main_process_ip node1 --main_process_port 20007 --rdzv_backend static --same_network "
            "-m pipeline ppo --config configs/llama-8b-fsdp/ppo.yaml run=mine"
        )
