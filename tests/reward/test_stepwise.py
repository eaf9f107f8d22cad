"""The objective stepwise: training, and the same score of a step everywhere."""

import json
import random
import re

import pytest
import torch
import yaml
from bitsandbytes.functional import has_avx512bf16
from datasets import Dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer

from pipeline import RewardModel, StepRewards, config
from pipeline.artifacts.inputs import open_external, require_artifact
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.ppo.backbone import attach_reward_adapter
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.prepare import stage as prepare
from pipeline.reward import stage as reward
from pipeline.reward.functions import reward_from_model
from pipeline.reward.objectives import stepwise

SCRATCH = {"layers": 1, "width": 32, "heads": 2, "vocabulary": 300, "positions": 96}
FORMS = {
    "scratch": {"model": "scratch", "scratch": SCRATCH},
    "encoder": {"model": "scratch", "scratch": SCRATCH | {"architecture": "bert"}},
    "full": {},
    "lora": {"lora": {"r": 4}},
    "8bit": {"lora": {"r": 4}, "quantization": "8bit"},
    "4bit": {"lora": {"r": 4}, "quantization": "4bit"},
}
PROMPTS = ["7+5-3+8=", "1+2+3+4=", "1+2+3+4="]
RESPONSES = ["7+5=2 2-3=9 9+8=7", "1+2=3 3+3=6 6+4=0", "1+2=3 3+3=7"]
STEPS = [response.split(" ") for response in RESPONSES]


def draw_steps(rows):
    """Chains of sums modulo 10; a step is wrong once in three times."""
    rng = random.Random(0)
    for _ in range(rows):
        numbers = [rng.randrange(10) for _ in range(4)]
        steps, labels, value = [], [], numbers[0]
        for number in numbers[1:]:
            error = rng.choice([0, 0, rng.randint(1, 9)])
            steps.append(f"{value}+{number}={(value + number + error) % 10}")
            labels.append(not error)
            value = (value + number + error) % 10
        yield {"prompt": "+".join(map(str, numbers)) + "=", "completions": steps, "labels": labels}


@pytest.fixture(scope="module")
def step_records(tmp_path_factory):
    root = tmp_path_factory.mktemp("steps")
    (root / "steps.jsonl").write_text("\n".join(map(json.dumps, draw_steps(120))))
    source = [{"format": "steps", "path": str(root / "steps.jsonl")}]
    return prepare.run(config.PrepareStage(run="steps", runs=str(root / "runs"), source=source))


def stage(records, runs, **more):
    return config.RewardStage(
        **{
            "run": "t",
            "runs": str(runs),
            "records": str(records),
            "objective": "stepwise",
            "encoding": {"step_separator": " "},
            "max_length": 64,
            "training": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
        }
        | more
    )


@pytest.fixture(scope="module", params=FORMS)
def trained(request, step_records, tiny_llama, tmp_path_factory):
    form = {"model": str(tiny_llama)} | FORMS[request.param]
    return request.param, reward.run(stage(step_records, tmp_path_factory.mktemp("runs"), **form))


def plain_steps(model, folder, form):
    """As a reader without this package would do it: the whole text, its offsets, one row at a time."""
    tokenizer, scores = AutoTokenizer.from_pretrained(folder), []
    for prompt, steps in zip(PROMPTS, STEPS, strict=True):
        text = " ".join(steps)
        if form == "encoder":
            inputs = tokenizer(prompt, text, return_tensors="pt", return_offsets_mapping=True)
            offsets = inputs.pop("offset_mapping")[0].tolist()
            segments = inputs.sequence_ids(0)
            places = [
                max(
                    i
                    for i, (start, _) in enumerate(offsets)
                    if segments[i] == 1 and start < len(" ".join(steps[:n]))
                )
                for n in range(1, len(steps) + 1)
            ]
        else:
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            response = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = chat + response.input_ids + [tokenizer.eos_token_id]
            inputs = {"input_ids": torch.tensor([ids])}
            places = [
                len(chat)
                + max(
                    i
                    for i, (start, _) in enumerate(response.offset_mapping)
                    if start < len(" ".join(steps[:n]))
                )
                for n in range(1, len(steps) + 1)
            ]
        with torch.no_grad():
            probabilities = model.eval()(**inputs).logits[0].softmax(-1)
        scores.append(probabilities[places, 1].tolist())
    return scores


def test_steps_score_the_same_in_plain_transformers(trained):
    form, folder = trained
    quantized = form in ("8bit", "4bit")
    loaded = RewardModel.load(folder)
    plain = loaded.model if quantized else AutoModelForTokenClassification.from_pretrained(folder)
    assert plain.config.id2label == {0: "wrong", 1: "right"}
    assert quantized or (folder / "adapter").exists() == (form == "lora")
    expected = plain_steps(plain, folder, form)
    found = loaded.score_steps(PROMPTS, RESPONSES)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-2 if form == "8bit" else 1e-5)
    assert max(map(max, found)) - min(map(min, found)) > 1e-4  # steps differ
    assert loaded.score_steps(PROMPTS, STEPS) == found


def test_one_backbone_rewards_steps_as_the_artifact_does(tiny_llama, step_records, tmp_path):
    lora = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}
    folder = reward.run(stage(step_records, tmp_path, model=str(tiny_llama), lora=lora))
    given = config.PPOStage(
        run="t", runs=str(tmp_path), policy=str(tiny_llama), reward=str(folder), lora={"r": 4}
    )
    policy, learned = open_external(tiny_llama, "policy"), require_artifact(folder, "reward", "")
    assert incompatibility(given, policy, learned) is None
    trunk = ppo.load_trained_policy(given, load_tokenizer(given.policy))
    source = attach_reward_adapter(trunk, learned, "reward_0")
    expected = reward_from_model(RewardModel.load(folder)).score(prompts=PROMPTS, completions=RESPONSES)
    for one, other in zip(source.score(prompts=PROMPTS, completions=RESPONSES), expected, strict=True):
        assert one.rewards == pytest.approx(other.rewards, abs=1e-5)
        assert one.ends == other.ends


def test_the_reward_of_a_step_is_what_a_right_one_is_worth_on_average(step_records, tiny_llama, tmp_path):
    folder = reward.run(stage(step_records, tmp_path, model=str(tiny_llama)))
    model = RewardModel.load(folder)
    model.settings.alpha = 2.0
    source = reward_from_model(model)
    assert (source.mean, source.std, source.model) == (0.0, 1.0, model)
    steps = model.score_steps(PROMPTS, RESPONSES)
    expected = [
        StepRewards([2.0 * (2 * p - 1) for p in row], ends)
        for row, ends in zip(steps, ([5, 11, 17], [5, 11, 17], [5, 11]), strict=True)
    ]
    assert source.score(PROMPTS, RESPONSES) == expected
    with pytest.raises(UserError, match="length_penalty: .* is stepwise; set it to 0"):
        reward_from_model(model, 0.5)


def test_the_code_of_the_card_computes_the_scores(trained):
    form, folder = trained
    card = (folder / "README.md").read_text()
    code = re.sub(r'(response = |load\()"[^"]*"', rf'\1"{folder}"', card)  # the card's is relative
    plain, ours = re.findall(r"```python\n(.*?)```", code, re.DOTALL)
    model, scope = RewardModel.load(folder), {}
    exec(plain, scope)
    texts = [scope["prompt"]], [scope["response"]]
    assert scope["response"] == "7 + 5 = 12 12 - 3 = 9"
    tolerance = 5e-3 if form == "4bit" and has_avx512bf16() else 1e-4
    assert scope["scores"].tolist() == pytest.approx(model.score_steps(*texts)[0], abs=tolerance)
    assert scope["reward"] == pytest.approx(model.score(*texts)[0], abs=tolerance)
    exec(ours, scope)
    assert (scope["scores"], scope["reward"]) == (model.score_steps(*texts)[0], model.score(*texts)[0])
    assert "the smallest score of its steps" in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "token-classification"
