"""Two processes, as `accelerate launch` starts them on a CPU: one artifact, written once, and what one
process would have learned.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch import distributed

from pipeline.artifacts.inputs import require_artifact, verify_artifact
from pipeline.artifacts.manifest import work_folder
from pipeline.artifacts.seals import read_seal, sealed_steps
from pipeline.config import RECIPES
from pipeline.distributed.processes import broadcast, destroy_process_group, map_across_processes
from tests.engines.stand_in import stand_in

pytestmark = pytest.mark.long

ROOT = RECIPES.parent
TOGETHER = str(ROOT / "tests/distributed/together.py")
ANSWERS = [{"prompt": f"Name {number} fruits.", "response": "Apples."} for number in range(5)]
CRITICS = ("ppo-adapter", "ppo-critic")
STAGES = (
    "sft",
    "pairwise",
    "ranking",
    "plackett_luce",
    "classification",
    "regression",
    "stepwise",
    "ppo",
    "ppo-engine",
    "ppo-shaped",
    *CRITICS,
)


def write_steps(folder: Path) -> None:
    """Write records of 1 to 5 steps, so that two processes have other numbers of steps."""
    rows = [
        {
            "prompt": f"Count to {n}.",
            "completions": list(map(str, range(1, n))),
            "labels": [n % 2 == 0] * (n - 1),
        }
        for n in (2, 6, 3, 5, 2, 4, 6, 2) * 5
    ]
    splits = {"train": rows, "validation": rows[:4], "test": rows[:4]}
    DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()}).save_to_disk(
        folder / "steps"
    )


def start(
    processes: int, *command: str, how: str = "cpu", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `command`, which follows `python`, in so many processes, by a file of configs/accelerate."""
    launcher = [
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        str(ROOT / f"configs/accelerate/{how}.yaml"),
    ]
    module = (
        [sys.executable, "-m", *launcher, "--num_processes", str(processes)]
        if processes > 1
        else [sys.executable]
    )
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*module, *command], env=given, capture_output=True, text=True, timeout=300)


def launch(processes: int, *command: str, **environment: str) -> str:
    """What it prints."""
    for attempt in (1, 2):  # the launcher picks a free port and then opens it: another process may come first
        done = start(processes, *command, **environment)
        if done.returncode == 0:
            return done.stdout
        print(f"attempt {attempt}: {done.stderr}")
    pytest.fail(f"{command} by {processes} processes failed twice: {done.stderr[-3000:]}")


def test_alone_one_agrees_with_oneself_and_does_all_the_work():
    assert broadcast("make") == "make"
    assert map_across_processes(lambda items: [2 * item for item in items], range(3)) == [0, 2, 4]


def test_a_group_joined_is_left():
    destroy_process_group()  # nothing to leave
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    destroy_process_group()
    assert not distributed.is_initialized()


def test_a_port_that_is_taken_is_told_before_anything_loads(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rank = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        done = start(
            1, "-m", "pipeline", "sft", "--config", str(RECIPES / "demo/sft.yaml"), f"runs={tmp_path}", **rank
        )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"the launch: the processes cannot connect at 127.0.0.1:{rank['MASTER_PORT']}" in line
    assert "--main_process_port 0" in line


@pytest.fixture(scope="module")
def trained(tiny_feedback, tiny_llama, tmp_path_factory) -> dict[int, Path]:
    """By the number of processes: the folder in which all stages were trained by them, sft asked for once
    more, and a file scored.
    """
    folders = {processes: tmp_path_factory.mktemp(f"by_{processes}") for processes in (1, 2)}
    for processes, folder in folders.items():
        write_steps(folder)
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ANSWERS)
        )
        printed = launch(
            processes,
            TOGETHER,
            str(folder),
            str(tiny_feedback),
            str(tiny_llama),
            *STAGES,
            "sft",
            "score",
            "best-of-n",
            "generate",
        )
        (folder / "printed.txt").write_text(printed)
    return folders


def test_one_of_two_writes_and_says_what_it_does(trained):
    folder = trained[2] / "sft" / "sft"
    verify_artifact(require_artifact(folder, "policy", "…"))
    printed = (trained[2] / "printed.txt").read_text()
    assert printed.count(f"sft: {folder}\n") == 2
    assert printed.count(f"sft: unchanged, reusing {folder}\n") == 1
    assert printed.count("5 rows written, 0 quarantined") == 3


def learned(folder: Path, stage: str) -> tuple[list[float], dict]:
    """The loss of each step, and the weights in the end."""
    artifact_folder = (
        folder / stage
        if stage.startswith("ppo")
        else folder / stage / ("sft" if stage == "sft" else "reward")
    )
    entries = map(json.loads, (artifact_folder / "log.jsonl").open(encoding="utf-8"))
    files = [artifact_folder / "model.safetensors"]
    if stage in CRITICS:
        files = [file for file in artifact_folder.rglob("*.safetensors") if "best" not in file.parts]
        assert len(files) == 3  # the policy, the critic and its value head
    weights = {
        f"{file.parent.name}/{name}": value for file in files for name, value in load_file(file).items()
    }
    return [entry["loss"] for entry in entries if "loss" in entry], weights


def assert_the_same(one: tuple[list[float], dict], other: tuple[list[float], dict]) -> None:
    assert other[0] == pytest.approx(one[0], abs=1e-5)
    assert max(float((one[1][name] - other[1][name]).abs().max()) for name in one[1]) < 1e-5


def samples(folder: Path) -> tuple[list[dict], list[float]]:
    """The samples of PPO's evaluation, and the critic's values of their tokens."""
    (file,) = (folder / "ppo" / "samples").iterdir()
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    values = [value for row in rows for value in row.pop("token_values")]
    return [{name: row[name] for name in ("prompt", "answer", "tokens")} for row in rows], values


def assert_the_same_samples(one: Path, other: Path) -> None:
    (rows, values), (other_rows, other_values) = map(samples, (one, other))
    assert rows == other_rows
    assert values == pytest.approx(other_values, abs=1e-4)
    assert any(values)


def test_the_gap_to_an_engine_is_that_of_all_processes(trained):
    gaps = []
    for processes in (1, 2):
        entries = map(json.loads, (trained[processes] / "ppo-engine/log.jsonl").open(encoding="utf-8"))
        gaps.append([{k: v for k, v in entry.items() if "sampler/" in k} for entry in entries])
    assert len(gaps[0][0]) == 5
    assert 0 < gaps[0][0]["sampler/capped_fraction"] < 1
    for one, two in zip(*gaps, strict=True):
        assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_learn_what_one_does(trained, stage):
    one, two = (learned(trained[processes], stage) for processes in (1, 2))
    assert len(one[0]) == (3 if stage.startswith("ppo") else 4)
    assert_the_same(one, two)
    if stage == "ppo":
        assert_the_same_samples(trained[1], trained[2])


def test_two_processes_decide_alike_when_the_critics_warm_up_ends(trained):
    entries = {
        processes: [
            entry
            for line in (folder / "ppo-critic/log.jsonl").open(encoding="utf-8")
            if "val/critic_warmup" in (entry := json.loads(line))
        ]
        for processes, folder in trained.items()
    }
    for name in ("val/critic_warmup", "val/explained_variance", "val/r_squared"):
        one, two = ([entry[name] for entry in entries[processes]] for processes in (1, 2))
        assert two == pytest.approx(one, abs=1e-5)
    lines = [
        (folder / "printed.txt").read_text().count("the critic's warm-up ends") for folder in trained.values()
    ]
    assert lines == [1, 1]


def test_two_processes_that_share_the_weights_learn_what_one_does(
    trained, tiny_feedback, tiny_llama, tmp_path
):
    """FSDP2, which needs no GPU but accelerate's leave: see sharded.py."""
    stages = ("sft", "ranking", "stepwise", "ppo", "ppo-shaped", *CRITICS)
    write_steps(tmp_path)
    launch(
        2,
        str(ROOT / "tests/distributed/sharded.py"),
        str(tmp_path),
        str(tiny_feedback),
        str(tiny_llama),
        *stages,
        "ppo-bf16",
        how="fsdp2",
    )
    for stage in stages:
        assert_the_same(learned(trained[1], stage), learned(tmp_path, stage))
    assert_the_same_samples(trained[1], tmp_path)
    # In bf16 they round otherwise; and a policy that has not moved has no KL to where it is.
    assert learned(tmp_path, "ppo-bf16")[0] == pytest.approx(learned(trained[1], "ppo")[0], abs=0.02)
    first = next(
        entry
        for line in (tmp_path / "ppo-bf16/log.jsonl").open()
        if "objective/kl" in (entry := json.loads(line))
    )
    assert first["objective/kl"] == 0.0


def test_a_process_killed_takes_the_run_down_and_one_process_goes_on_from_there(
    trained, tiny_feedback, tiny_llama, tmp_path
):
    given = [TOGETHER, str(tmp_path), str(tiny_feedback), str(tiny_llama), "pairwise"]
    killed = start(2, *given, KILL="3")
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL) received" in killed.stderr
    assert "resuming" in launch(1, *given, BEGUN_BY="2")
    assert_the_same(learned(trained[1], "pairwise"), learned(tmp_path, "pairwise"))


def test_a_signal_to_one_process_stops_both_at_the_same_step(trained, tiny_feedback, tiny_llama, tmp_path):
    given = [TOGETHER, str(tmp_path), str(tiny_feedback), str(tiny_llama), "pairwise"]
    launch(2, *given, KILL="3", SIGNAL=str(int(signal.SIGTERM)))
    work = work_folder(tmp_path / "pairwise" / "reward")
    assert sealed_steps(work) == [2, 3]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= read_seal(work / "checkpoint-3")["files"].keys()
    assert "resuming" in launch(2, *given)
    assert_the_same(learned(trained[2], "pairwise"), learned(tmp_path, "pairwise"))


@pytest.mark.parametrize("command", ["score", "best-of-n"])
def test_two_processes_score_a_file_and_draw_answers_as_one_does(trained, command):
    one, two = ([json.loads(line) for line in (trained[n] / f"{command}.jsonl").open()] for n in (1, 2))
    assert len(one) == 5
    assert [row["reward"] for row in two] == pytest.approx([row["reward"] for row in one], abs=1e-5)
    assert [row["response"] for row in two] == [row["response"] for row in one]


def test_two_processes_generate_the_responses_of_one(trained):
    one, two = ((trained[n] / "generate.jsonl").read_text() for n in (1, 2))
    assert len(one.splitlines()) == 5
    assert two == one


ON_SERVERS = {
    "num_rollouts": 2,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "per_device_train_batch_size": 2,
    "response_tokens": 6,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "no",
    "report_to": "none",
}


def train_on_servers(how, folder, records, policy, *urls):
    """Start PPO by two processes whose responses the servers sample."""
    stage = {"run": "t", "runs": str(folder), "records": str(records), "policy": str(policy)}
    stage |= {"reward": "pipeline.prepare.demo:gold_reward", "training": ON_SERVERS}
    stage |= {"rollouts": {"url": list(urls), "timeout": 5}}
    (folder / "ppo.json").write_text(json.dumps(stage))
    return how(2, "-m", "pipeline", "ppo", "--config", str(folder / "ppo.json"))


def gaps_of(folder):
    """The largest gap between servers and trainer of each rollout."""
    log = [json.loads(line) for line in (folder / "t/ppo/log.jsonl").open(encoding="utf-8")]
    return [entry["sampler/logprob_gap_max"] for entry in log if "sampler/logprob_gap_max" in entry]


def test_two_processes_share_two_servers_that_get_each_policy_once(tiny_records, tiny_gpt2, tmp_path):
    with stand_in(tiny_gpt2) as first, stand_in(tiny_gpt2) as second:
        train_on_servers(launch, tmp_path, tiny_records, tiny_gpt2, first.url, second.url)
        for server in (first, second):
            paths = [path for path, _ in server.asked]
            assert paths.count("/collective_rpc") == 3  # two rollouts, and the evaluation at the end
            long = [body for _, body in server.asked if body.get("max_tokens") == 6]
            assert sum(len(body["prompt"]) for body in long) == (2 * 4 + 14) / 2
    gaps = gaps_of(tmp_path)
    assert len(gaps) == 2
    assert max(gaps) < 1e-4


def test_a_server_that_one_of_two_processes_loses_ends_both_with_a_line_each(
    tiny_records, tiny_gpt2, tmp_path
):
    with stand_in(tiny_gpt2) as first, stand_in(tiny_gpt2) as second:
        second.faults = [None] * 18 + [lambda reply: second.stop() or reply]  # in the second rollout
        done = train_on_servers(start, tmp_path, tiny_records, tiny_gpt2, first.url, second.url)
        assert done.returncode != 0
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) in (1, 2)  # the launcher may end a process before it says its line
        assert all(line.startswith(f"error: {second.url}/") for line in lines)  # at whichever request it was
        assert "resuming" in train_on_servers(launch, tmp_path, tiny_records, tiny_gpt2, first.url)
    assert len(gaps_of(tmp_path)) == 2
