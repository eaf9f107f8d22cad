"""One backbone computes what separate copies do: scores, log-probabilities, gradients, a whole run."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import RewardModel, config
from pipeline.artifacts.inputs import open_external, require_artifact
from pipeline.errors import UserError
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.backbone import attach_reward_adapter
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.reward import stage as reward
from pipeline.sft import stage as sft

LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}
PROMPTS = ["What is the capital of France?", "Name the colour of snow.", "What is the capital of France?"]
ANSWERS = ["Paris.", "Snow is white, as far as I know.", "You fool."]
SHORT = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
# Of two runs' weights, as a share of how far training moved them.
TOLERANCES = {"none": 1e-3, "8bit": 0.05, "4bit": 1e-3}


@pytest.fixture(scope="module", params=["none", "8bit", "4bit"])
def artifacts(request, tiny_records, tiny_llama, tmp_path_factory):
    """(quantization, sft artifact, reward artifact): LoRA adapters of one base."""
    common = {
        "run": "t",
        "runs": str(tmp_path_factory.mktemp("runs")),
        "records": str(tiny_records),
        "model": str(tiny_llama),
    }
    common |= {"max_length": 96, "lora": LORA, "quantization": request.param, "training": SHORT}
    policy, learned = sft.run(config.SFTStage(**common)), reward.run(config.RewardStage(**common))
    return request.param, require_artifact(policy, "policy", ""), require_artifact(learned, "reward", "")


def stage(artifacts, folder, **more):
    quantization, policy, learned = artifacts
    given = {
        "run": "t",
        "runs": str(folder),
        "policy": str(policy.path),
        "reward": str(learned.path),
        "lora": {},
        "quantization": quantization,
    }
    return config.PPOStage(**given | more)


def joined(artifacts, folder):
    """The policy, and the reward model on its backbone."""
    given = stage(artifacts, folder)
    policy = ppo.load_trained_policy(given, load_tokenizer(given.policy))
    assert incompatibility(given, *artifacts[1:]) is None
    return policy, attach_reward_adapter(policy, artifacts[2], "reward_0")


def test_the_scores_are_those_of_the_artifact_alone(artifacts, tmp_path):
    policy, source = joined(artifacts, tmp_path)
    alone = RewardModel.load(artifacts[2].path)
    expected, found = alone.score(PROMPTS, ANSWERS), source.score(prompts=PROMPTS, completions=ANSWERS)
    assert max(expected) - min(expected) > 0.01
    assert found == pytest.approx(expected, abs=1e-5)
    assert (source.mean, source.std) == (alone.settings.reward_mean, alone.settings.reward_std)
    shared = {id(parameter) for parameter in source.model.model.parameters()} & {
        id(parameter) for parameter in policy.parameters()
    }
    assert len(shared) == len(list(source.model.model.parameters())) - 1  # all but the head


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_are_those_of_separate_copies(checkpointing, artifacts, tmp_path):
    found = []
    for shares in (False, True):
        policy, source = joined(artifacts, tmp_path)
        if not shares:
            policy.delete_adapter("reward_0")
        actor = ActorCritic(policy, 0.1).train()
        if checkpointing:
            actor.gradient_checkpointing_enable()
        torch.manual_seed(1)
        torch.nn.init.normal_(actor.value_head.weight, std=0.1)
        ids = [
            torch.randint(5, 200, (3, width), generator=torch.Generator().manual_seed(width))
            for width in (6, 4)
        ]
        inputs = {
            "query_ids": ids[0],
            "query_mask": torch.ones_like(ids[0]),
            "response_ids": ids[1],
            "response_mask": torch.ones_like(ids[1]),
        }
        trained = [name for name, parameter in actor.named_parameters() if parameter.requires_grad]
        if shares:
            source.score(prompts=PROMPTS, completions=ANSWERS)
            actor.train()
        with torch.no_grad():
            reference = actor.reference_logprobs(**inputs, temperature=0.7)
        out = actor(**inputs, temperature=0.7)
        (out.logprobs.sum() + out.values.square().sum()).backward()
        assert [name for name, parameter in actor.named_parameters() if parameter.requires_grad] == trained
        gradients = {
            name: parameter.grad for name, parameter in actor.named_parameters() if parameter.requires_grad
        }
        found.append({"logprobs": out.logprobs.detach(), "reference": reference} | gradients)
    assert found[0].keys() == found[1].keys()
    assert not any("reward_0" in name for name in found[1])
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("critic", ["trunk", "adapter"])
def test_a_run_ends_in_the_same_policy_on_one_backbone_or_two(critic, artifacts, tiny_records, tmp_path):
    training = {
        "num_rollouts": 2,
        "num_ppo_epochs": 2,
        "per_device_train_batch_size": 4,
        "response_tokens": 6,
        "optim": "sgd",
    }
    weights = []
    for number, where in enumerate(("never", "always")):
        given = {
            "records": str(tiny_records),
            "one_backbone": where,
            "critic": {"on": critic},
            "training": training | {"learning_rate": 0.1, "eval_strategy": "no"},
        }
        folder = ppo.run(stage(artifacts, tmp_path / str(number), **given))
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        weights.append(load_file(folder / "adapter_model.safetensors"))
    start = load_file(artifacts[1].path / "adapter_model.safetensors")
    assert weights[0].keys() == weights[1].keys() == start.keys()
    moved = max(float((weights[0][name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for name in start:
        torch.testing.assert_close(
            weights[1][name], weights[0][name], rtol=0, atol=TOLERANCES[artifacts[0]] * moved
        )


@pytest.mark.parametrize("artifacts", ["none"], indirect=True)
def test_why_a_reward_model_stands_apart(artifacts, tiny_records, tiny_gpt2, tiny_llama, tmp_path):
    _, policy, learned = artifacts

    def at(**more):
        return stage(artifacts, tmp_path, **more)

    common = {
        "run": "other",
        "runs": str(tmp_path),
        "records": str(tiny_records),
        "max_length": 96,
        "training": SHORT,
    }
    other = reward.run(config.RewardStage(model=str(tiny_gpt2), lora={"r": 2}, **common))
    assert "trained in full" in incompatibility(at(lora=None), policy, learned)
    assert f"its base is {tiny_gpt2}" in incompatibility(at(), policy, require_artifact(other, "reward", ""))
    assert (
        incompatibility(at(quantization="8bit"), policy, learned)
        == "its base has quantization: none, the policy's 8bit"
    )
    assert (
        incompatibility(at(precision="bf16"), policy, learned)
        == "it was trained on a base in fp32, the policy's is in bf16"
    )
    assert "no LoRA adapter" in incompatibility(at(), policy, open_external(tiny_gpt2, "reward"))
    for meddling in ({"bias": "all"}, {"init_lora_weights": "olora"}, {"trainable_token_indices": [3]}):
        full = {"policy": str(tiny_llama), "lora": meddling}
        expected = f"the policy's adapter has {next(iter(meddling))}="
        assert incompatibility(at(**full), require_artifact(tiny_llama, "policy", ""), learned).startswith(
            expected
        )
    assert (
        incompatibility(at(policy=str(tiny_llama)), require_artifact(tiny_llama, "policy", ""), learned)
        is None
    )
    with pytest.raises(
        UserError, match=r"one_backbone: always, but its base is .*; change that, or set one_backbone: auto"
    ):
        ppo.run(at(reward=str(other), one_backbone="always", records=str(tiny_records)))


def test_in_bf16_the_head_reads_a_trunk_in_bf16(tiny_records, tiny_llama, tmp_path):
    common = {
        "run": "t",
        "runs": str(tmp_path),
        "records": str(tiny_records),
        "lora": LORA,
        "precision": "bf16",
    }
    learned = reward.run(config.RewardStage(model=str(tiny_llama), max_length=96, training=SHORT, **common))
    given = config.PPOStage(policy=str(tiny_llama), reward=str(learned), **common)
    tokenizer, source = load_tokenizer(given.policy), require_artifact(learned, "reward", "")
    assert incompatibility(given, require_artifact(tiny_llama, "policy", ""), source) is None
    policy = ppo.load_trained_policy(given, tokenizer)
    assert policy.dtype == torch.bfloat16
    found = attach_reward_adapter(policy, source, "reward_0").score(prompts=PROMPTS, completions=ANSWERS)
    assert found == pytest.approx(RewardModel.load(learned).score(PROMPTS, ANSWERS), abs=0.01)


@pytest.mark.parametrize("kind", ["classes", "ensemble"])
def test_other_heads_join_too(kind, tiny_feedback, tiny_llama, tmp_path):
    what = (
        {"objective": "classification", "positive_label": "nothate"}
        if kind == "classes"
        else {"ensemble": 3, "uncertainty_penalty": 0.5}
    )
    common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_feedback), "lora": LORA}
    learned = reward.run(
        config.RewardStage(model=str(tiny_llama), max_length=96, training=SHORT, **what, **common)
    )
    given = config.PPOStage(policy=str(tiny_llama), reward=str(learned), **common)
    policy = ppo.load_trained_policy(given, load_tokenizer(given.policy))
    found = attach_reward_adapter(policy, require_artifact(learned, "reward", ""), "reward_0").score(
        prompts=PROMPTS, completions=ANSWERS
    )
    assert found == pytest.approx(RewardModel.load(learned).score(PROMPTS, ANSWERS), abs=1e-5)
    assert len(set(found)) == 3


def test_an_adapter_of_another_task_is_neither_reward_nor_policy(tiny_llama, tmp_path):
    tokenizer = load_tokenizer(str(tiny_llama))
    for task in ("CAUSAL_LM", "SEQ_CLS"):
        base = load_policy(str(tiny_llama), tokenizer)
        get_peft_model(base, LoraConfig(r=2, task_type=task, modules_to_save=[])).save_pretrained(
            tmp_path / task
        )
        tokenizer.save_pretrained(tmp_path / task)
    with pytest.raises(UserError, match="is an adapter of task CAUSAL_LM; a reward needs one of SEQ_CLS"):
        RewardModel.load(tmp_path / "CAUSAL_LM")
    with pytest.raises(UserError, match="is an adapter of task SEQ_CLS; a policy needs one of CAUSAL_LM"):
        load_policy(str(tmp_path / "SEQ_CLS"), tokenizer)


def test_an_adapter_whose_base_has_moved_is_refused(tiny_records, tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    common = {
        "run": "t",
        "runs": str(tmp_path),
        "records": str(tiny_records),
        "max_length": 96,
        "training": SHORT,
    }
    folder = sft.run(config.SFTStage(model=str(base), lora={"r": 2}, **common))
    require_artifact(folder, "policy", "")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    with pytest.raises(
        UserError,
        match=(
            r"is an adapter of .*base, which has changed since: restore the version it was trained "
            r"on; run: make it"
        ),
    ):
        require_artifact(folder, "policy", "make it")
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"which no longer exists: restore it; run: make it"):
        require_artifact(folder, "policy", "make it")
