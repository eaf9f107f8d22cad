"""The columns of a prompt's row reach reward functions through every stage, with the values of the file."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from pipeline import config
from pipeline.errors import UserError
from pipeline.evaluate import stage as evaluate
from pipeline.evaluate.metrics import gold_records
from pipeline.ppo import stage as ppo
from pipeline.prepare import stage as prepare
from pipeline.reward import stage as reward

METAS = [{"level": 1.5, "source": {"ids": [1, 2]}}, None, {"level": None, "source": {"ids": []}}]
ROWS = {
    f"What is {n}?": {
        "answer": n,
        "share": None if n % 4 == 1 else n / 4,
        "tags": ["odd", "prime"][: n % 3],
        "meta": METAS[n % 3],
        "label": n % 2 == 0,
    }
    for n in range(24)
}
PPO = {"num_rollouts": 1, "num_ppo_epochs": 1, "per_device_train_batch_size": 4, "response_tokens": 4}
TRL = {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 8, "max_completion_length": 4}

seen: set[str] = set()  # prompts that `recording` was called with


def recording(prompts, completions, completion_ids, ended, **columns):
    """Check the columns of each prompt, and return its answer as the reward."""
    for number, prompt in enumerate(prompts):
        row = {name: values[number] for name, values in columns.items()}
        assert row == ROWS[prompt]
        assert {name: type(value) for name, value in row.items()} == {
            name: type(value) for name, value in ROWS[prompt].items()
        }
    seen.update(prompts)
    return [float(answer) for answer in columns["answer"]]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("columns")
    pairs = [{"prompt": prompt, "chosen": "It is.", "rejected": "No."} for prompt in ROWS]
    rows = {"prompts": [{"prompt": prompt} | row for prompt, row in ROWS.items()], "comparisons": pairs}
    sources = []
    for name, table in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, table)))
        sources.append({"format": name, "path": str(folder / f"{name}.jsonl")})
    return prepare.run(config.PrepareStage(run="t", runs=str(folder), source=sources))


def tune(records: Path, folder: Path, policy: Path, algorithm: str = "ppo", **more) -> Path:
    given = {"policy": str(policy), "records": str(records), "run": "t", "runs": str(folder)}
    training = PPO if algorithm == "ppo" else TRL
    rewards = {"reward": f"{__name__}:recording", "gold": f"{__name__}:recording"}
    return ppo.run(config.PPOStage(algorithm=algorithm, training=training, **rewards, **given, **more))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_training_and_its_evaluation(records, tiny_gpt2, tmp_path, algorithm):
    seen.clear()
    folder = tune(records, tmp_path, tiny_gpt2, algorithm)
    prompts = load_from_disk(str(records / "prompts"))
    held_out = set(prompts["validation"]["prompt"])
    assert held_out < seen <= held_out | set(prompts["train"]["prompt"])
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["eval_gold_reward"] == pytest.approx(
        sum(ROWS[prompt]["answer"] for prompt in held_out) / len(held_out)
    )


def test_evaluate(records, tiny_gpt2, tmp_path):
    common = {"run": "t", "runs": str(tmp_path), "records": str(records)}
    scored = reward.run(
        config.RewardStage(model=str(tiny_gpt2), max_length=96, training={"max_steps": 1}, **common)
    )
    functions = dict.fromkeys(["gold", "scorer", "well_formed"], f"{__name__}:recording")
    few = {"prompts": 2, "best_of": 2, "samples_per_prompt": 1, "response_tokens": 4}
    measures = {"answers": f"{__name__}:recording"}
    models = {"sft": str(tiny_gpt2), "ppo": str(tiny_gpt2), "reward": str(scored)}
    seen.clear()
    folder = evaluate.run(config.EvaluateStage(measures=measures, **functions, **few, **models, **common))
    metrics = json.loads((folder / "metrics.json").read_text())
    test = load_from_disk(str(records / "prompts"))["test"]["prompt"][:2]
    pairs = load_from_disk(str(records / "comparisons"))["test"]["prompt"][:]
    assert seen == {*test, *pairs}
    assert metrics["reward"]["comparisons"]["accuracy_ceiling"] == 0.5  # both responses have the same reward
    mean = sum(ROWS[prompt]["answer"] for prompt in test) / 2
    for name in ("gold_reward", "scorer_reward", "answers"):
        assert metrics["ppo"][name] == metrics["sft"][name] == pytest.approx(mean)


def test_records_of_ones_own(tiny_gpt2, tmp_path):
    """A folder of `save_to_disk`."""
    table = Dataset.from_list([{"prompt": prompt} | row for prompt, row in ROWS.items()])
    DatasetDict(train=table, validation=table.select(range(4))).save_to_disk(str(tmp_path / "own"))
    for algorithm in ("ppo", "grpo"):
        seen.clear()
        tune(tmp_path / "own", tmp_path / algorithm, tiny_gpt2, algorithm)
        assert set(table["prompt"][:4]) < seen
    table.rename_column("label", "ended").save_to_disk(str(tmp_path / "wrong"))
    with pytest.raises(
        UserError, match=r"wrong: column 'ended': reward functions have an argument of this name"
    ):
        tune(tmp_path / "wrong", tmp_path / "runs", tiny_gpt2)


def test_a_pair_without_a_record_of_its_prompt_is_no_case_for_gold():
    pairs = Dataset.from_list([{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ("P", " Q")])
    prompts = Dataset.from_list([{"prompt": "Q", "answer": 7}, {"prompt": "P", "answer": 8}])
    assert gold_records(pairs, prompts)["answer"][:] == [8, 7]
    assert gold_records(pairs, prompts.select([0])) is None
    assert gold_records(pairs, prompts.select([0]).select_columns(["prompt"]))["prompt"][:] == ["P", " Q"]
