"""Stages that start from an adapter: trained further, or merged first; in SFT, PPO and TRL's trainers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline import config
from pipeline.artifacts.inputs import require_artifact
from pipeline.errors import UserError
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.reward import stage as reward
from pipeline.sft import stage as sft
from pipeline.tools.doctor.examine import examine

IDS = torch.tensor([[5, 6, 7, 8]])
STEPS = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
STILL = STEPS | {"learning_rate": 1e-12}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ROLLOUTS = {
    "ppo": {"num_rollouts": 1, "num_ppo_epochs": 1, "response_tokens": 4},
    "rloo": {"max_steps": 1, "num_generations": 2, "max_completion_length": 4, "beta": 0.1},
}


def run_sft(records, runs, run, model, training=STEPS, **more):
    common = {"run": run, "runs": str(runs), "records": str(records), "max_length": 64}
    return sft.run(config.SFTStage(model=str(model), training=training, **common, **more))


def ppo_stage(records, runs, policy, algorithm="ppo", learning_rate=1e-2, **more):
    training = ROLLOUTS[algorithm] | {"per_device_train_batch_size": 2, "learning_rate": learning_rate}
    return config.PPOStage(
        run=f"p{len(list(runs.iterdir()))}",
        runs=str(runs),
        records=str(records),
        policy=str(policy),
        algorithm=algorithm,
        reward="pipeline.prepare.demo:gold_reward",
        training=training | {"save_strategy": "no"},
        **more,
    )


def first_token(completion_ids, **_):
    """A reward that differs between responses."""
    return [float(ids[0]) for ids in completion_ids]


@pytest.fixture(scope="module")
def start(tiny_records, tiny_llama, tmp_path_factory):
    """An adapter that SFT published."""
    return run_sft(tiny_records, tmp_path_factory.mktemp("start"), "start", tiny_llama, lora=LORA)


def logits(folder):
    model = load_policy(str(folder), load_tokenizer(str(folder)))
    with torch.no_grad():
        return model.eval()(IDS).logits


FORMS = {
    "continue": {"lora": {}},
    "merge": {"adapter": "merge", "lora": LORA, "merge": True},
    "merge in full": {"adapter": "merge"},
}


@pytest.mark.parametrize("form", FORMS)
def test_sft_goes_on_from_what_the_adapter_computes(form, start, tiny_records, tiny_llama, tmp_path):
    still = run_sft(tiny_records, tmp_path, "still", start, STILL, **FORMS[form])
    torch.testing.assert_close(logits(still), logits(start), atol=1e-4, rtol=1e-4)
    assert (logits(start) - logits(tiny_llama)).abs().max() > 1e-3
    moved = run_sft(tiny_records, tmp_path, "moved", start, **FORMS[form])
    assert (logits(moved) - logits(start)).abs().max() > 1e-3

    if form == "continue":
        adapter = json.loads((moved / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["r"]) == (str(tiny_llama), LORA["r"])
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, moved))
        assert before.keys() == after.keys()
        # The start may go; the base is still the first one.
        assert incompatibility_of_continued(moved, tiny_records, tiny_llama, tmp_path) is None
    else:
        assert not (moved / "adapter_config.json").exists()
        assert (moved / "adapter").exists() == (form == "merge")


def incompatibility_of_continued(policy, records, base, runs):
    """Why a reward model on the base is no adapter on the backbone of a policy that was trained further."""
    common = {"run": "r", "runs": str(runs), "records": str(records), "max_length": 64, "training": STEPS}
    learned = reward.run(config.RewardStage(model=str(base), lora=LORA, **common))
    opened = require_artifact(policy, "policy", ""), require_artifact(learned, "reward", "")
    return incompatibility(ppo_stage(records, runs, policy, lora={}), *opened)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
@pytest.mark.parametrize("form", FORMS)
def test_ppo_starts_from_what_the_adapter_computes(
    form, algorithm, start, tiny_records, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.prepare.demo.gold_reward", first_token)
    given = ppo_stage(tiny_records, tmp_path, start, algorithm, **FORMS[form])
    policy = ppo.load_trained_policy(given, load_tokenizer(str(start)))
    with torch.no_grad():
        torch.testing.assert_close(policy.eval()(IDS).logits, logits(start), atol=1e-4, rtol=1e-4)
    folder = ppo.run(given)
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["eval_kl"] == pytest.approx(0, abs=0.5)
    assert (logits(folder) - logits(start)).abs().max() > 1e-4
    assert (folder / "adapter_config.json").exists() == (form == "continue")


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_the_reference_of_a_merged_policy_is_that_policy(algorithm, start, tiny_records, tmp_path):
    given = ppo_stage(tiny_records, tmp_path, start, algorithm, learning_rate=1e-12, adapter="merge")
    folder = ppo.run(given)
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["eval_kl"] == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(logits(folder), logits(start), atol=1e-4, rtol=1e-4)


def test_a_reward_model_trains_all_weights_of_the_merged_adapter(start, tiny_records, tmp_path):
    common = {"run": "r", "runs": str(tmp_path), "records": str(tiny_records), "max_length": 64}
    folder = reward.run(config.RewardStage(model=str(start), training=STEPS, **common))
    still = reward.run(config.RewardStage(model=str(start), training=STILL, **common | {"run": "still"}))
    moved, kept = (load_file(each / "model.safetensors") for each in (folder, still))
    assert [name for name in moved if torch.equal(moved[name], kept[name])] == []


def test_without_lora_both_remedies_are_named(start, tiny_records, tmp_path):
    message = "set lora: {} to train it further, or adapter: merge to train all weights of the merged model"
    with pytest.raises(UserError, match=f"is a LoRA adapter, but sft has no 'lora:' section; {message}"):
        run_sft(tiny_records, tmp_path, "x", start)
    with pytest.raises(UserError, match=f"is a LoRA adapter, but ppo has no 'lora:' section; {message}"):
        ppo.run(ppo_stage(tiny_records, tmp_path, start))
    findings, errors = examine(ppo_stage(tiny_records, tmp_path, start), {}, None)
    assert errors == 1
    assert message in dict(findings)["memory"]


def test_values_that_a_continued_adapter_does_not_read_are_named(start, tiny_records, tmp_path, caplog):
    run_sft(tiny_records, tmp_path, "x", start, lora={"r": 64, "lora_alpha": 8})
    assert "not read: lora.r=64 (it has 2); adapter: merge trains a new one" in caplog.text


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_an_initialization_that_changes_the_base(init, algorithm, tiny_records, tiny_llama, tmp_path):
    """PPO refuses the adapter, which a second one would change, and starts from the merged one."""
    lora = LORA | {"init_lora_weights": init}
    folder = run_sft(tiny_records, tmp_path, "a", tiny_llama, lora=lora)
    refused = ppo_stage(tiny_records, tmp_path, folder, algorithm, lora={})
    with pytest.raises(UserError, match=f"its adapter has init_lora_weights={init}, .* merge: true"):
        ppo.run(refused)
    assert f"init_lora_weights={init}" in dict(examine(refused, {}, None)[0])["memory"]

    given = ppo_stage(tiny_records, tmp_path, folder, algorithm, adapter="merge")
    policy = ppo.load_trained_policy(given, load_tokenizer(str(folder)))
    with torch.no_grad():
        torch.testing.assert_close(policy.eval()(IDS).logits, logits(folder), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "lora", [{"init_lora_weights": "pissa"}, {"init_lora_weights": False}, {"kasa_config": {}}]
)
def test_an_adapter_of_ppo_that_is_not_nothing_at_first_is_refused(lora, tiny_llama, tmp_path):
    (key,) = lora
    with pytest.raises(UserError, match=f"ppo: lora.{key}=.* would not start from SFT's"):
        ppo.check(ppo_stage("none", tmp_path, tiny_llama, lora=lora))


SETTINGS = [
    ({"bias": "all"}, "lora.bias=all: PEFT keeps trained biases of the base for one adapter only; remove it"),
    ({"lora_bias": True}, "lora.lora_bias=True: PEFT cannot merge such an adapter; remove it"),
    ({"layers_pattern": "h"}, "lora: When `layers_pattern` is specified, `layers_to_transform` must also be"),
]


@pytest.mark.parametrize(("lora", "message"), SETTINGS)
def test_settings_with_which_no_stage_trains_are_refused_by_each(lora, message, tmp_path):
    for stage, module in (
        (config.SFTStage(run="t", model="m", lora=lora), sft),
        (config.RewardStage(run="t", model="m", lora=lora), reward),
        (ppo_stage("none", tmp_path, "m", lora=lora), ppo),
    ):
        with pytest.raises(UserError) as error:
            module.check(stage)
        assert str(error.value).startswith(f"{stage.stage}: {message}")


def test_modules_that_peft_does_not_find_are_one_line_everywhere(tiny_records, tiny_llama, tmp_path):
    lora = {"target_modules": ["nope"]}
    expected = "lora.target_modules: the model has no module 'nope'; name others, or try lora.target_modules"
    with pytest.raises(UserError, match=f"^sft: {expected}"):
        run_sft(tiny_records, tmp_path, "a", tiny_llama, lora=lora)
    given = ppo_stage(tiny_records, tmp_path, tiny_llama, lora=lora)
    with pytest.raises(UserError, match=f"^ppo: {expected}"):
        ppo.run(given)
    assert dict(examine(given, {}, None)[0])["memory"].startswith(f"error: {expected}")
