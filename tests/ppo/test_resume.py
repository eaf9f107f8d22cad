"""A run killed at any moment and started again by the same command ends in the bits of one left alone."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config
from pipeline.reward import stage as reward

pytestmark = pytest.mark.long

TRAINING = {
    "num_rollouts": 4,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 8,
    "response_tokens": 6,
    "learning_rate": 1e-3,
    "score_normalization": "running",
    "kl_target": 0.1,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "value_init": "zero",
}
CRITIC = {
    "lam_value": 1.0,
    "lam_length": 0.5,
    "clip_value": None,
    "critic_warmup_rollouts": 3,
    "critic_warmup_patience": 1,
}
KILLS = 10


@pytest.fixture(scope="module")
def killable():
    script, pipe = Path(__file__).parent / "killable.py", subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as process:

        def run(stage, digest, fault=None):
            process.stdin.write(json.dumps({"stage": stage, "digest": str(digest), "fault": fault}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def ending(folder: Path, digest: Path) -> dict[str, bytes]:
    """All that the run leaves: weights, critic, the best of both, its log and samples, and the optimizer's
    state.
    """
    names = ("*.safetensors", "log.jsonl", "samples.jsonl")
    files = {
        str(file.relative_to(folder)): file.read_bytes() for name in names for file in folder.rglob(name)
    }
    return files | {"optimizer": digest.read_bytes()}


@pytest.fixture(scope="module")
def forms(tiny_records, tiny_gpt2, tmp_path_factory):
    """In full with a function for its reward and a warm-up of the critic, and with LoRA, where the reward
    model is an adapter of the same backbone.
    """
    common = {
        "run": "t",
        "runs": str(tmp_path_factory.mktemp("reward")),
        "records": str(tiny_records),
        "lora": {"r": 2},
    }
    learned = reward.run(
        config.RewardStage(model=str(tiny_gpt2), max_length=64, training={"max_steps": 2}, **common)
    )
    on_it = {"lora": {"r": 2}, "reward": str(learned), "one_backbone": "always"}
    full = {"reward": "pipeline.prepare.demo:gold_reward", "training": TRAINING | CRITIC}
    return {"full": full, "lora": on_it}


@pytest.mark.parametrize("form", ["full", "lora"])
def test_killed_ten_times_it_ends_in_the_same_bits(form, forms, killable, tiny_records, tiny_gpt2, tmp_path):
    def stage(name):
        runs = tmp_path / name
        runs.mkdir()
        common = {
            "run": "t",
            "runs": str(runs),
            "records": str(tiny_records),
            "policy": str(tiny_gpt2),
            "training": TRAINING,
        }
        return common | forms[form]

    alone = killable(stage("alone"), tmp_path / "alone.digest")
    assert alone["code"] == 0
    expected = ending(tmp_path / "alone" / "t" / "ppo", tmp_path / "alone.digest")
    assert {
        "optimizer",
        "log.jsonl",
        "samples.jsonl",
        "critic/value_head.safetensors",
        "best/critic/value_head.safetensors",
    } <= expected.keys()

    written = {
        name: [i for i, each in enumerate(alone["events"]) if each == name]
        for name in ("save_file", "save", "save_to_json")
    }
    assert all(len(numbers) > 2 for numbers in written.values())
    rng = random.Random(form)
    faults = {
        rng.choice(numbers[1:]) for numbers in written.values()
    }  # in the middle of a checkpoint's files
    faults |= set(rng.sample(sorted(set(range(len(alone["events"]))) - faults), KILLS - len(faults)))
    for fault in sorted(faults):
        given, digest = stage(f"killed-{fault}"), tmp_path / f"{fault}.digest"
        killed = killable(given, digest, fault)
        assert killed["code"] == -9
        assert len(killed["events"]) == fault + 1
        assert killable(given, digest)["code"] == 0
        found = ending(Path(given["runs"]) / "t" / "ppo", digest)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == [], (
            f"killed at {alone['events'][fault]}, event {fault}"
        )
