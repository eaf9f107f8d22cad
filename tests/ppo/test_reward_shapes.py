"""Running statistics and reference responses in training: in checkpoints, sampled once, logged by name."""

import json
from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import UserError
from pipeline.ppo import reward_shapes
from pipeline.ppo import stage as ppo
from pipeline.ppo.policy_trainer import PolicyTrainer
from pipeline.ppo.reward_shapes import SampleReferences

SPREAD, EVEN = (f"{__name__}:{name}" for name in ("spread", "even"))
REWARDS = [
    {"source": SPREAD, "normalize": "running", "weight": 1.0},
    {"source": EVEN, "transform": "sigmoid", "references": 2, "weight": 2.0, "name": "evenness"},
]
TRAINING = {
    "ppo": {
        "num_rollouts": 4,
        "num_ppo_epochs": 1,
        "per_device_train_batch_size": 4,
        "response_tokens": 6,
        "save_steps": 2,
        "eval_steps": 2,
    },
    "rloo": {
        "max_steps": 4,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "save_steps": 1,
        "eval_steps": 4,
    },
}
COMMON = {"learning_rate": 1e-3, "eval_strategy": "steps", "eval_on_start": True, "disable_tqdm": True}
STOP: dict[str, int] = {}  # at a call of `spread` in this step of training, KeyboardInterrupt comes


def spread(prompts, completions, completion_ids, trainer_state, **_):
    if trainer_state is not None and trainer_state.global_step == STOP.get("step"):
        raise KeyboardInterrupt
    return [None if ids[0] % 5 == 0 else float(max(ids) - min(ids)) for ids in completion_ids]


def even(prompts, completions, completion_ids, **_):
    return [float(sum(token % 2 == 0 for token in ids)) for ids in completion_ids]


@pytest.fixture
def run(tiny_records, tiny_gpt2, tmp_path, monkeypatch):
    """Run the stage; return its folder, the parts of its reward, and the sampled references."""
    sample, write = PolicyTrainer.sample, ppo.write_rewards

    def start(name, algorithm):
        parts, references = [], []

        def watch(trainer, data, indices, rollout, rows):
            if str(rollout).startswith("references"):
                if len(references) == STOP.get("references"):
                    raise KeyboardInterrupt
                references.extend((rollout, row) for row in rows)
            return sample(trainer, data, indices, rollout, rows)

        def keep(folder, sections, sources):
            parts.extend(sources)
            write(folder, sections, sources)

        monkeypatch.setattr(reward_shapes, "CHUNK", 6)
        monkeypatch.setattr(PolicyTrainer, "sample", watch)
        monkeypatch.setattr(ppo, "write_rewards", keep)
        common = {"run": name, "runs": str(tmp_path), "records": str(tiny_records), "policy": str(tiny_gpt2)}
        training = COMMON | TRAINING[algorithm]
        stage = config.PPOStage(reward=REWARDS, algorithm=algorithm, training=training, **common)
        return ppo.run(stage), parts, references

    return start


@pytest.fixture
def interrupted(run, monkeypatch):
    """Run the stage until a step, and then again."""

    def start(name, algorithm, step):
        monkeypatch.setitem(STOP, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(name, algorithm)
        monkeypatch.delitem(STOP, "step")
        return run(name, algorithm)

    return start


def test_a_resumed_run_has_the_statistics_and_references_to_the_bit(run, interrupted):
    folder, parts, references = run("alone", "ppo")
    running = parts[0].shape.running
    log = [json.loads(line) for line in (folder / "log.jsonl").open()]
    assert 0 < running.count <= 16
    assert len(references) == len(set(references)) > 0
    assert {"train", "eval"} == {rollout.removeprefix("references-") for rollout, _ in references}
    assert all(len(scores) == 2 for scores in parts[1].shape.references.scores.values())
    assert all({"rewards/spread", "rewards/evenness"} <= row.keys() for row in log if "loss" in row)
    evaluations = [row for row in log if "eval_reward" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 4]
    for row in evaluations:  # σ is between 0 and 1, times 2; the share without a spread is near 1/5
        mean, std = running.first
        scaled = (row["eval_rewards/spread"] - mean) / std
        assert scaled - 0.5 < row["eval_reward"] < scaled + 2.5

    again, resumed, more = interrupted("killed", "ppo", step=3)
    assert more == []
    assert vars(resumed[0].shape.running) == vars(running)
    assert resumed[1].shape.references.scores == parts[1].shape.references.scores
    for name in ("model.safetensors", "log.jsonl", "rewards.json", "samples.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_an_interrupted_sampling_of_references_goes_on_with_the_next_prompts(run, monkeypatch):
    _, parts, whole = run("alone", "ppo")
    monkeypatch.setitem(STOP, "references", 12)  # two for each of six prompts
    with pytest.raises(KeyboardInterrupt):
        run("killed", "ppo")
    monkeypatch.delitem(STOP, "references")
    _, resumed, rest = run("killed", "ppo")
    assert rest == whole[12:]
    assert resumed[1].shape.references.scores == parts[1].shape.references.scores


def test_rloo_resumes_with_the_statistics_of_its_checkpoint(run, interrupted):
    folder, parts, references = run("alone", "rloo")
    count = parts[0].shape.running.count
    assert count > 0
    assert len(references) == len(set(references)) > 0
    rows = [json.loads(line) for line in (folder / "log.jsonl").open()]
    assert any("rewards/evenness" in row for row in rows)
    assert all("eval_rewards/evenness" in row for row in rows if "eval_reward" in row)

    _, resumed, more = interrupted("killed", "rloo", step=3)  # the last checkpoint is of that step
    assert more == []
    running = resumed[0].shape.running
    assert running.first == parts[0].shape.running.first  # of the evaluation at step 0
    assert running.count > 4  # of the one step after the resume, 4 responses at most


def test_references_that_are_lost_are_not_sampled_from_a_trained_policy(run, interrupted, monkeypatch):
    lost = []

    def lose(self, *args, **kwargs):
        folder = Path(str(self.trainer.args.output_dir)) / "references"
        for file in folder.glob("train-*"):
            file.unlink()
            lost.append(file)
        return original(self, *args, **kwargs)

    original = SampleReferences.on_train_begin
    monkeypatch.setitem(STOP, "step", 3)
    with pytest.raises(KeyboardInterrupt):
        run("lost", "ppo")
    monkeypatch.delitem(STOP, "step")
    monkeypatch.setattr(SampleReferences, "on_train_begin", lose)
    with pytest.raises(
        UserError, match=r"train-0000000.json: absent or damaged, and the policy is no longer"
    ):
        run("lost", "ppo")
    assert len(lost) == 3  # of 16 prompts
