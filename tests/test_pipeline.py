"""The whole run, small: from nothing to a report, reused, repaired, interrupted, and never half-valid."""

import json
import re
from pathlib import Path

import pytest
from datasets import load_from_disk

from pipeline.cli import main
from pipeline.config import RECIPES

SMALL = [
    "sft.scratch.layers=1",
    "sft.scratch.width=16",
    "sft.scratch.heads=2",
    "sft.training.max_steps=4",
    "sft.training.eval_strategy=no",
    "sft.training.save_steps=2",
    "reward.training.max_steps=4",
    "reward.training.eval_strategy=no",
    "reward.training.save_steps=2",
    "ppo.training.num_rollouts=2",
    "ppo.training.per_device_train_batch_size=8",
    "ppo.training.response_tokens=8",
    "ppo.training.eval_strategy=no",
    "ppo.evaluation.keep=false",
    "ppo.training.eval_on_start=false",
    "evaluate.prompts=3",
    "evaluate.response_tokens=8",
]


def run(*more, until="evaluate"):
    stages = ["prepare", "sft", "reward", "ppo", "evaluate"]
    small = [item for item in SMALL if item.split(".")[0] in stages[: stages.index(until) + 1]]
    return main(["run", "--recipe", "demo", "--run", "t", "--until", until, *small, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run() == 0
        yield place / "runs" / "t"


def test_the_metrics_named_by_the_contract_are_there(folder):
    metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
    assert {"accuracy", "accuracy_ceiling", "accuracy_longer"} <= metrics["reward"]["comparisons"].keys()
    for section, names in {
        "sft": {"gold_reward", "response_tokens"},
        "ppo": {"gold_reward", "reward", "kl", "response_tokens", "win_rate_gold", "well_formed"},
        "best_of_16": {"gold_reward"},
    }.items():
        assert names <= metrics[section].keys()
    assert metrics["reward"]["comparisons"]["pairs"] >= 1000
    rows = metrics["rows"]
    assert rows["read"] == rows["kept"] + rows["merged"] + sum(rows["quarantined"].values())
    assert metrics["sft"]["gold_reward"] == pytest.approx(-1, abs=0.2)  # four steps teach nobody to speak


def test_no_prompt_is_in_two_splits(folder):
    kinds = ("demonstrations", "comparisons", "rankings", "labels", "ratings", "prompts")
    seen = {
        split: {p for kind in kinds for p in load_from_disk(str(folder / "prepare" / kind))[split]["prompt"]}
        for split in ("train", "test")
    }
    assert seen["train"]
    assert not seen["train"] & seen["test"]


def test_a_second_run_reuses_every_stage(folder, capsys):
    assert run() == 0
    assert capsys.readouterr().out.count("unchanged, reusing") == 5


def test_a_changed_byte_is_found_by_the_next_stage_and_mended_by_the_run(folder, capsys):
    weights = folder / "sft" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert main(["ppo", "--config", str(RECIPES / "demo" / "ppo.yaml"), "--run", "t"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert run(until="sft") == 0
    assert weights.read_bytes() == before


def test_the_python_of_the_readme_runs(folder):
    blocks = re.findall(r"```python\n(.*?)```", (RECIPES.parent / "README.md").read_text(), re.S)
    code = next(block for block in blocks if "RewardModel" in block)
    scope: dict = {}
    exec(code.replace("runs/demo/", f"{folder}/"), scope)
    question, answers = "What is the capital of France?", ["You fool.", "The capital of France is Paris."]
    assert scope["rm"].rank(question, answers) == sorted(
        (0, 1), key=lambda i: -scope["rm"].score([question], [answers[i]])[0]
    )


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(folder):
    assert run("--run", "again") == 0
    weights = [
        "sft/model.safetensors",
        "reward/model.safetensors",
        "ppo/model.safetensors",
        "ppo/critic/value_head.safetensors",
    ]
    again = folder.parent / "again"
    assert [(again / name).read_bytes() == (folder / name).read_bytes() for name in weights] == [True] * 4
    assert (
        run("--run", "again", "--seed", "1", until="sft") == 2
    )  # what is finished is not replaced in silence
    assert (again / weights[0]).read_bytes() == (folder / weights[0]).read_bytes()
    assert run("--run", "again", "--seed", "1", "--force", until="sft") == 0
    assert (again / weights[0]).read_bytes() != (folder / weights[0]).read_bytes()


def test_an_interrupted_stage_goes_on_from_its_checkpoint_to_the_same_bits(folder, capsys, monkeypatch):
    from pipeline.sft import stage

    before = (folder / "sft" / "model.safetensors").read_bytes()
    monkeypatch.setattr(
        stage, "write_log", _interrupt
    )  # after the last checkpoint, before anything is published
    assert run("--force", until="sft") == 130
    assert (folder / "sft" / "model.safetensors").read_bytes() == before
    (folder / "sft" / "manifest.json").unlink()
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent.parent)
    assert run(until="sft") == 0
    assert "resuming" in capsys.readouterr().out
    assert (folder / "sft" / "model.safetensors").read_bytes() == before


def _interrupt(*_):
    raise KeyboardInterrupt


def test_the_world_of_sums_rewards_steps_from_the_reward_model_to_the_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left_out = ("evaluate.response_tokens", "ppo.training.response_tokens", "evaluate.prompts", "reward.")
    small = [item for item in SMALL if not item.startswith(left_out)]
    sizes = ["prepare.source.limit=600", "evaluate.prompts=4", "evaluate.best_of=2"]
    assert main(["run", "--recipe", "sums", "--run", "t", *small, *sizes]) == 0

    metrics = json.loads(Path("runs/t/evaluate/metrics.json").read_text())
    assert list(metrics["reward"]) == ["steps", "comparisons"]
    assert metrics["reward"]["steps"]["rows"] == 20
    assert 0 <= metrics["ppo"]["right_steps"] <= 1

    rows = list(map(json.loads, Path("runs/t/ppo/samples.jsonl").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 10
    for row in rows:
        assert "".join(row["tokens"]) == row["answer"]
        assert sum(row["token_rewards"]) == pytest.approx(row["reward"])
        assert sum(reward != 0 for reward in row["token_rewards"]) <= max(1, len(row["answer"].split()))
    assert "Rewards inside the response" in Path("runs/t/evaluate/report.html").read_text(encoding="utf-8")


def test_an_answer_key_trains_and_evaluates_from_the_records_of_the_prompts(tmp_path, monkeypatch):
    """No reward model is trained: PPO and evaluate read the answer key."""
    monkeypatch.chdir(tmp_path)
    left_out = ("evaluate.response_tokens", "ppo.training.response_tokens", "evaluate.prompts", "reward.")
    small = [item for item in SMALL if not item.startswith(left_out)]
    sizes = ["prepare.source.limit=600", "evaluate.prompts=4", "evaluate.best_of=2"]
    assert main(["run", "--recipe", "answer-key", "--run", "t", *small, *sizes]) == 0
    metrics = json.loads(Path("runs/t/evaluate/metrics.json").read_text())
    assert 0 <= metrics["ppo"]["gold_reward"] <= 1
    assert not Path("runs/t/reward").exists()
    assert metrics["ppo"]["reward"] == metrics["ppo"]["gold_reward"]
    for line in Path("runs/t/ppo/samples.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line)["reward"] in (0, 1)
