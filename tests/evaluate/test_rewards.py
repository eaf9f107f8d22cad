"""evaluate compares by the rewards that PPO was trained on: functions, and sums of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from pipeline import config
from pipeline.cli import main
from pipeline.evaluate.rewards import describe_rewards, load_rewards
from pipeline.evaluate.summary import summary_table
from pipeline.tools.doctor.plans import plan_stage

LENGTH, ENDED, ANSWERED = (f"{__name__}:{name}" for name in ("length", "ended_itself", "answered"))


def length(prompts, completions, completion_ids, ended, **_):
    return [len(ids) for ids in completion_ids]


def ended_itself(prompts, completions, completion_ids, ended, **_):
    return [float(end) for end in ended]


def answered(prompts, completions, answer, **_):
    """Whether the response contains the answer in the prompt's record."""
    return [float(right in text) for right, text in zip(answer, completions, strict=True)]


SAMPLES = {
    "prompt": ["a?", "a?", "b?", "b?"],
    "text": ["yes", "no", "yes", "no, no"],
    "ids": [[5], [6, 7], [5], [6, 7, 6, 7]],
    "ended": [True, True, True, False],
}
PROMPTS = Dataset.from_dict({"prompt": ["a?", "b?"], "answer": ["yes", "no"]})


@pytest.mark.parametrize(
    ("reward", "penalty", "expected", "text"),
    [
        (ANSWERED, 0.0, [1, 0, 0, 1], ANSWERED),
        ([LENGTH, ENDED], 0.0, [1, 1.5, 1, 2], f"0.5 × {LENGTH} + 0.5 × {ENDED}"),
        (
            [{"source": LENGTH, "weight": 2}, {"source": ANSWERED, "weight": -1}],
            0.0,
            [1, 4, 2, 7],
            f"2 × {LENGTH} + -1 × {ANSWERED}",
        ),
        # The standard deviation of two numbers is half their difference.
        (
            [LENGTH, ENDED],
            1.0,
            [1, 1, 1, 0],
            f"0.5 × {LENGTH} + 0.5 × {ENDED}, less 1 standard deviations between them",
        ),
    ],
)
def test_functions_are_summed_as_ppo_sums_them(
    reward: Any, penalty: float, expected: list[float], text: str
) -> None:
    stage = config.EvaluateStage(run="t", reward=reward, uncertainty_penalty=penalty)
    score, models, _ = load_rewards(stage, {})
    assert (score(SAMPLES, PROMPTS)["reward"], models) == (expected, {})
    assert describe_rewards(stage) == text


@pytest.fixture
def recipe(tmp_path: Path, tiny_gpt2: Path, tiny_feedback: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of ppo.yaml and evaluate.yaml alone, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    training = {"num_rollouts": 1, "per_device_train_batch_size": 4, "response_tokens": 4}
    ppo = {"records": str(tiny_feedback), "policy": str(tiny_gpt2), "training": training}
    ppo["reward"] = [{"source": LENGTH, "weight": 2.0}, {"source": ENDED, "weight": -1.0}]
    evaluate = {"records": str(tiny_feedback), "sft": str(tiny_gpt2), "temperature": 1.5}
    evaluate |= {"prompts": 3, "best_of": 2, "samples_per_prompt": 1, "response_tokens": 4}
    folder = tmp_path / "brief"
    folder.mkdir()
    for name, values in {"ppo": ppo, "evaluate": evaluate}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_a_run_without_a_reward_model_is_whole(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--recipe", str(recipe)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "prepare: skipped, ppo.records and evaluate.records name no records of this run",
        "sft: skipped, ppo.policy and evaluate.sft name no policy of this run",
        "reward: skipped, ppo.reward names no reward model of this run",
    ]
    summed = f"2 × {LENGTH} + -1 × {ENDED}"
    assert f"  reward: {summed}" in said
    folder = Path("runs/brief/evaluate")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["reward"] == {}
    for policy in ("sft", "best_of_2", "ppo"):  # means of a sum are sums of means
        by_hand = 2 * metrics[policy]["response_tokens"] - metrics[policy]["ended_fraction"]
        assert metrics[policy]["reward"] == pytest.approx(by_hand)
    assert metrics["best_of_2"]["reward"] >= metrics["sft"]["reward"]
    assert f"reward, ppo {metrics['ppo']['reward']:.3f}" in " ".join(summary_table(folder).split())
    page = (folder / "report.html").read_text()
    assert f'<p class="hint">The reward is <code>{summed}</code>.</p>' in page
    assert '<section id="measured">' not in page
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest["inputs"]) == ["records", "sft", "ppo"]

    # The stage alone takes the reward from PPO's artifact, and so finds its work done.
    assert main(["evaluate", "--config", str(recipe / "evaluate.yaml")]) == 0
    assert "evaluate: unchanged, reusing" in capsys.readouterr().out
    assert main(["show", "runs/brief"]) == 0
    states = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[3:8]}
    assert states == {
        "prepare": "skipped", "sft": "skipped", "reward": "skipped", "ppo": "done", "evaluate": "done"
    }  # fmt: skip


def test_parts_of_a_sum_are_named_and_have_the_scale_that_ppo_found(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo = yaml.safe_load((recipe / "ppo.yaml").read_text())
    ppo["reward"] = [
        {"source": LENGTH, "weight": 2.0, "normalize": "running", "name": "long"},
        {"source": ENDED, "weight": -1.0, "transform": "sigmoid", "references": 2},
    ]
    (recipe / "ppo.yaml").write_text(yaml.safe_dump(ppo))
    assert main(["run", "--recipe", str(recipe)]) == 0
    said = capsys.readouterr().out
    summed = f"2 × {LENGTH} (normalized) + -1 × {ENDED} (σ against 2 of SFT's responses)"
    assert f"  reward: {summed}\n" in said

    folder = Path("runs/brief/evaluate")
    metrics = json.loads((folder / "metrics.json").read_text())
    long, ended = json.loads(Path("runs/brief/ppo/rewards.json").read_text())["rewards"]
    assert [long["name"], ended["name"], ended["mean"]] == ["long", "ended_itself", None]
    for policy in ("sft", "best_of_2", "ppo"):
        section = metrics[policy]
        assert section["rewards/long"] == section["response_tokens"]
        assert section["rewards/ended_itself"] == section["ended_fraction"]
        # σ of −1, 0 or 1 is between 0.26 and 0.74
        scaled = 2 * (section["response_tokens"] - long["mean"]) / long["std"]
        assert scaled - 0.74 < section["reward"] < scaled - 0.26
    table = " ".join(summary_table(folder).split())
    assert f"rewards/long, ppo {metrics['ppo']['rewards/long']:.3f}" in table
    page = (folder / "report.html").read_text()
    assert "Reward long" in page
    assert "Reward ended_itself" in page
    assert main(["show", "runs/brief"]) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("ppo  ") and "KL" in line
    ]
    assert "long " in line
    assert "ended_itself " in line


def test_doctor_counts_no_reward_model(
    recipe: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe / "reward.yaml").write_text("model: scratch")
    assert main(["doctor", "--config", str(recipe)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "reward: skipped, ppo.reward names no reward model of this run"
    assert [line for line in said[1:] if line.split()[0].startswith("reward")] == []
    for reward, models in ((LENGTH, 2), ([LENGTH, str(tiny_gpt2)], 3)):  # beside both policies
        stage = config.EvaluateStage(run="t", sft=str(tiny_gpt2), ppo=str(tiny_gpt2), reward=reward)
        assert len(plan_stage(stage, {}, None, None)[0]) == models


def test_the_target_reward_says_what_it_means(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    until = ["run", "--recipe", str(recipe), "--until", "reward", "--dry-run"]
    assert main(until) == 2
    assert capsys.readouterr().err == (
        f"error: --until reward: {recipe} has no reward.yaml, and ppo.reward names no reward model of this "
        "run: there is no reward model to train; end with --until ppo\n"
    )
    (recipe / "reward.yaml").write_text("model: scratch\nrecords: data")
    assert main(until) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "reward: trained for --until reward alone: ppo.reward names no reward model of this run",
        "reward: would write runs/brief/reward",
    ]
    assert main(["run", "--recipe", str(recipe), "reward.max_length=9"]) == 2
    assert "override 'reward.max_length=9': the run skips this stage: ppo.reward names" in (
        capsys.readouterr().err
    )


def test_labels_alone_train_a_reward_model_without_sft(
    tmp_path: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n}?", "completion": "Yes." if n % 2 else "No.", "label": n % 2} for n in range(40)]
    Path("labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages = {
        "prepare": {"source": [{"format": "labels", "path": "labels.jsonl"}]},
        "sft": {"model": str(tiny_gpt2)},
        "reward": {
            "model": str(tiny_gpt2),
            "objective": "classification",
            "max_length": 32,
            "training": {"max_steps": 1, "eval_strategy": "no"},
        },
    }
    Path("labels").mkdir()
    for name, values in stages.items():
        Path("labels", f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert main(["run", "--recipe", "labels", "--until", "sft"]) == 2  # there are no demonstrations
    capsys.readouterr()
    assert main(["run", "--recipe", "labels", "--until", "reward"]) == 0
    assert "\nsft: skipped, reward.model names no policy of this run\n" in capsys.readouterr().out
    assert json.loads(Path("runs/labels/reward/metrics.json").read_text())["labels"]["rows"] > 0
