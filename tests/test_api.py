"""The examples in the docstrings of what `pipeline` exports run as they are, in a folder with a run."""

import doctest

import pytest
import torch
from safetensors.torch import load_file

import pipeline
from pipeline import RewardModel, config
from pipeline.models.loading import load_policy
from pipeline.ppo.trainer import PPOTrainer
from pipeline.reward import stage as reward
from pipeline.reward.functions import reward_from_model

EXPORTED = [name for name in pipeline.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_records, tiny_gpt2):
    """A folder with runs/demo/prepare, sft and reward."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "runs" / "demo").mkdir(parents=True)
    (folder / "runs" / "demo" / "prepare").symlink_to(tiny_records)
    (folder / "runs" / "demo" / "sft").symlink_to(tiny_gpt2)
    training = {"max_steps": 2, "per_device_train_batch_size": 2}
    given = {"model": str(tiny_gpt2), "records": str(tiny_records), "max_length": 64, "training": training}
    reward.run(config.RewardStage(run="demo", runs=str(folder / "runs"), precision="fp32", **given))
    return folder


@pytest.mark.parametrize("name", EXPORTED)
def test_the_examples_of_the_docstrings_run(name, place, monkeypatch):
    monkeypatch.chdir(place)
    finder, runner = (
        doctest.DocTestFinder(recurse=False),
        doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL),
    )
    (test,) = finder.find(getattr(pipeline, name), name, globs={})
    said = []
    assert runner.run(test, out=said.append).failed == 0, "".join(said)
    assert len(test.examples) >= 4


def test_what_a_program_saves_is_the_policy(place, monkeypatch, tiny_gpt2, tiny_tokenizer):
    """And not the policy as it was."""
    monkeypatch.chdir(place)
    test_the_examples_of_the_docstrings_run("PPOTrainer", place, monkeypatch)
    saved, start = (
        load_policy(str(folder), tiny_tokenizer).state_dict() for folder in ("out/policy", tiny_gpt2)
    )
    trained = load_file("out/checkpoint-8/model.safetensors")
    assert all(
        torch.equal(saved[name.removeprefix("policy.")], value)
        for name, value in trained.items()
        if name.startswith("policy.")
    )
    assert not torch.equal(saved["transformer.wte.weight"], start["transformer.wte.weight"])


def test_a_reward_model_is_a_reward(place, tiny_gpt2, tiny_tokenizer, tmp_path):
    from datasets import Dataset

    rm = RewardModel.load(place / "runs" / "demo" / "reward")
    policy, prompts = load_policy(str(tiny_gpt2), tiny_tokenizer), Dataset.from_list([{"prompt": "Hello."}])
    trainer = PPOTrainer(
        policy, rm, pipeline.PPOConfig(str(tmp_path)), train_dataset=prompts, processing_class=tiny_tokenizer
    )
    source = reward_from_model(rm)
    assert (trainer.reward.mean, trainer.reward.std, trainer.reward.model) == (source.mean, source.std, rm)
    assert trainer.reward.score(prompts=["Hello."], completions=["Hi."]) == rm.score(["Hello."], ["Hi."])
