"""reward: training on pairs in every form, and the same score everywhere."""

import json
from operator import add

import pytest
import torch
from datasets import load_from_disk
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline import RewardModel, config
from pipeline.errors import UserError
from pipeline.models.chat import encode_turn
from pipeline.reward import stage as reward
from pipeline.reward.dataset import tokenize_records
from pipeline.reward.encoding import Encoding

FORMS = {
    "full": {},
    "lora": {"lora": {"r": 4}},
    "8bit": {"lora": {"r": 4}, "quantization": "8bit"},
    "4bit": {"lora": {"r": 4}, "quantization": "4bit"},
}


def stage(tiny_records, runs, model, **more):
    steps = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return config.RewardStage(
        run="t",
        runs=str(runs),
        model=str(model),
        records=str(tiny_records),
        max_length=96,
        training=steps,
        **more,
    )


@pytest.fixture(scope="module", params=FORMS)
def trained(request, tiny_records, tiny_llama, tmp_path_factory):
    return request.param, reward.run(
        stage(tiny_records, tmp_path_factory.mktemp("runs"), tiny_llama, **FORMS[request.param])
    )


@pytest.fixture(scope="module")
def pairs(tiny_records):
    rows = load_from_disk(str(tiny_records / "comparisons"))["train"].select(range(20))
    return rows["prompt"][:], rows["chosen"][:]


def plain_scores(model, folder, prompts, responses):
    """As a reader without this package would do it, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text)["input_ids"] + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            scores.append(model.eval()(input_ids=torch.tensor([ids])).logits.item())
    return scores


def test_the_checkpoint_scores_the_same_in_plain_transformers(trained, pairs):
    form, folder = trained
    quantized = form in ("8bit", "4bit")
    # On a quantized base: the base as it was trained, then the adapter.
    opened = (
        RewardModel.load(folder).model
        if quantized
        else AutoModelForSequenceClassification.from_pretrained(folder)
    )
    expected = plain_scores(opened, folder, *pairs)
    # An 8-bit forward quantizes activations by batch, so that padding shows; elsewhere the scores are equal.
    assert RewardModel.load(folder).score(*pairs) == pytest.approx(
        expected, abs=2e-2 if form == "8bit" else 1e-4
    )
    assert len({round(score, 4) for score in expected}) > 1


def test_what_is_published(trained):
    form, folder = trained
    assert (folder / "adapter" / "adapter_model.safetensors").exists() == (form == "lora")
    assert (folder / "adapter_config.json").exists() == (form in ("8bit", "4bit"))
    settings = json.loads((folder / "reward.json").read_text())
    assert settings["quantization"] == (form if form in ("8bit", "4bit") else "none")
    assert settings["reward_std"] > 0
    assert json.loads((folder / "manifest.json").read_text())["metrics"].keys() == {"comparisons"}


def test_in_bf16_an_adapter_is_merged_in_full_precision(tiny_records, tiny_llama, tmp_path):
    folder = reward.run(
        stage(
            tiny_records, tmp_path, tiny_llama, lora={"r": 4, "target_modules": ["q_proj"]}, precision="bf16"
        )
    )
    merged = (
        AutoModelForSequenceClassification.from_pretrained(folder).model.layers[0].self_attn.q_proj.weight
    )
    base = (
        AutoModelForCausalLM.from_pretrained(tiny_llama)
        .model.layers[0]
        .self_attn.q_proj.weight.bfloat16()
        .float()
    )  # as it was trained
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=1)
    learned = adapter.get_base_model().model.layers[0].self_attn.q_proj.get_delta_weight("default")
    assert merged.dtype == torch.float32
    assert learned.abs().max() > 0
    torch.testing.assert_close(merged, base + learned, atol=1e-7, rtol=0)


def test_a_lora_head_is_trained_and_kept(tiny_records, tiny_llama, tmp_path):
    folder = reward.run(stage(tiny_records, tmp_path, tiny_llama, lora={"r": 4}))
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=1)
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    head = next(p for name, p in adapter.named_parameters() if "score.modules_to_save" in name)
    assert torch.equal(head, merged.score.weight)


@pytest.fixture(scope="module")
def full(tiny_records, tiny_gpt2, tmp_path_factory):
    return reward.run(stage(tiny_records, tmp_path_factory.mktemp("runs"), tiny_gpt2))


def test_the_score_depends_on_nothing_but_the_pair(full, pairs):
    prompts, responses = pairs
    model = RewardModel.load(full)
    expected = model.score(prompts, responses, batch_size=64)
    assert model.score(prompts, responses, batch_size=1) == pytest.approx(expected, abs=1e-5)
    assert model.score(prompts[::-1], responses[::-1], batch_size=7)[::-1] == pytest.approx(
        expected, abs=1e-5
    )


def test_the_text_classification_pipeline_gives_the_same(full, pairs):
    prompts, responses = pairs
    tokenizer = AutoTokenizer.from_pretrained(full)
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": r}], tokenize=False
        )
        for p, r in zip(prompts, responses, strict=True)
    ]
    found = [row["score"] for row in pipeline("text-classification", model=str(full))(rendered)]
    assert found == pytest.approx(RewardModel.load(full).score(prompts, responses), abs=1e-4)


def test_alpha_normalize_rank_and_best_of_n(full, pairs):
    prompts, responses = pairs
    model = RewardModel.load(full)
    raw = model.score(prompts, responses)
    assert model.score(prompts, responses, alpha=10) == pytest.approx([10 * s for s in raw])
    centred = [(s - model.settings.reward_mean) / model.settings.reward_std for s in raw]
    assert model.score(prompts, responses, normalize=True) == pytest.approx(centred)
    answers = ["You fool.", "Good question! The capital of Italy is Rome.", "I do not care."]
    scores = model.score(["Name the capital of Italy."] * 3, answers)
    assert model.rank("Name the capital of Italy.", answers) == sorted(range(3), key=lambda i: -scores[i])
    assert model.best_of_n("Name the capital of Italy.", answers) == (
        scores.index(max(scores)),
        pytest.approx(max(scores), abs=1e-5),
    )


def test_the_trainer_is_given_the_one_encoding(tiny_records, tiny_tokenizer):
    rows = load_from_disk(str(tiny_records / "comparisons"))["train"].select(range(3))
    made, _ = tokenize_records(rows, "comparisons", tiny_tokenizer, Encoding(max_length=96), drop=False)
    for row, found in zip(rows, made, strict=True):
        # As SFT reads the same prompt and answer.
        assert found["ids"] == [
            add(*encode_turn(tiny_tokenizer, row["prompt"], row[side])) for side in ("chosen", "rejected")
        ]
        assert found["target"] == [1, 2]
        assert found["length"] == sum(map(len, found["ids"]))


def test_wrong_inputs_are_named(full, tiny_gpt2, tmp_path):
    with pytest.raises(UserError, match="2 prompts but 1 responses"):
        RewardModel.load(full).score(["a", "b"], ["c"])
    with pytest.raises(UserError, match="cannot be loaded"):
        RewardModel.load(tmp_path)
    with pytest.raises(UserError, match=r"has no reward head \(it lacks score.weight\)"):
        RewardModel.load(tiny_gpt2)
    model = AutoModelForSequenceClassification.from_pretrained(
        full, num_labels=2, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "two")
    RewardModel.load(full).tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match=r"two: has the labels \['LABEL_0', 'LABEL_1'\] and no reward.json"):
        RewardModel.load(tmp_path / "two")


def test_arguments_of_another_kind_are_named(full):
    rm = RewardModel.load(full)
    calls = {
        "prompts: expected a list of texts, found 'ab'": lambda: rm.score("ab", ["No.", "No."]),
        "prompts: expected a list of texts, found None": lambda: rm.logits(None, ["No."]),
        r"responses\[0\]: expected a string .*, found None": lambda: rm.score(["x"], [None]),
        r"responses\[1\]: expected a string .*, found 3": lambda: rm.score(["x", "y"], ["No.", 3]),
        "responses: expected a list of texts, found 'No.'": lambda: rm.lengths("No."),
        "response: expected a string .*, found None": lambda: rm.score_response("x", None),
        "prompt: expected a string .*, found None": lambda: rm.best_of_n(None, ["No."]),
        "responses: expected a list of texts, found 'ab'; put": lambda: rm.rank("x", "ab"),
        "responses: is an empty list; expected at least one": lambda: rm.best_of_n("x", []),
        "responses: is an empty list": lambda: rm.rank("x", []),
        "batch_size=0: expected a whole number above 0": lambda: rm.score(["x"], ["No."], batch_size=0),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=f"^{message}"):
            call()
    assert rm.score([[]], ["No."]) == rm.score([""], ["No."])
    assert (rm.score([], []), rm.lengths([])) == ([], [])
