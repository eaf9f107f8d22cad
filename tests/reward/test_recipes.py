"""The five known reward models, in small: trained, published, and scoring the same wherever they are read."""

import json
import math
import shutil

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pipeline import RewardModel, config
from pipeline.models.chat import completion_text
from pipeline.reward import stage as reward
from pipeline.reward.dataset import tokenize_records
from pipeline.reward.functions import reward_from_model
from pipeline.reward.trainer import RewardTrainer

FIVE = ("gpt2-ranked", "toxicity", "gpt2-acceptance", "bert-regression", "distilbert-ranked")
SMALL = [
    "training.max_steps=3",
    "training.per_device_train_batch_size=4",
    "training.eval_strategy=no",
    "max_length=96",
]


def small(recipe, tmp_path, records, tiny_gpt2, **more):
    overrides = [
        *SMALL,
        f"runs={tmp_path}",
        f"records={records}",
        *(f"{key}={value}" for key, value in more.items()),
    ]
    if recipe.startswith("gpt2"):
        overrides.append(f"model={tiny_gpt2}")
    if recipe == "gpt2-acceptance":
        overrides.append("positive_label=nothate")  # the classes of the records at hand
    return config.load("reward", config.RECIPES / recipe / "tiny" / "reward.yaml", overrides)


@pytest.fixture(scope="module", params=FIVE)
def five(request, tmp_path_factory, tiny_feedback, tiny_gpt2):
    loaded = small(request.param, tmp_path_factory.mktemp("runs"), tiny_feedback, tiny_gpt2)
    return request.param, loaded, reward.run(loaded)


@pytest.fixture(scope="module")
def answered(tiny_feedback):
    """200 prompts and answers."""
    rows = load_from_disk(str(tiny_feedback / "comparisons"))["train"].select(range(100))
    return rows["prompt"][:] * 2, rows["chosen"][:] + rows["rejected"][:]


def plain_logits(folder, prompts, responses):
    """As a reader without this package would do it, in batches of seven."""
    recipe = json.loads((folder / "reward.json").read_text())["encoding"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for start in range(0, len(prompts), 7):
        pairs = list(zip(prompts[start : start + 7], responses[start : start + 7], strict=True))
        if recipe["form"] == "pair":
            inputs = tokenizer(*zip(*pairs, strict=True), padding=True, return_tensors="pt")
        elif recipe["form"] == "concatenation":
            inputs = tokenizer(
                [prompt + recipe["separator"] + answer for prompt, answer in pairs],
                padding=True,
                return_tensors="pt",
            )
        else:
            turns = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt, answer in pairs
            ]
            texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
            inputs = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            found.append(model(**inputs).logits)
    return torch.cat(found)


def pipeline_input(recipe, tokenizer, prompt, answer):
    if recipe["form"] == "pair":
        return {"text": prompt, "text_pair": answer}
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def trainer_outputs(loaded, folder, prompts, responses, tmp_path):
    """What the trainer that made it computes in an evaluation, on rows of the same answers."""
    from datasets import Dataset
    from trl import RewardConfig

    rm = RewardModel.load(folder)
    made_up = {
        "comparisons": {"chosen": responses, "rejected": responses},
        "ratings": {"completion": responses, "rating": [0.0] * 200},
    }
    made_up["rankings"] = {"responses": [[r, r + "!"] for r in responses], "ranks": [[1, 2]] * 200}
    made_up["labels"] = {"completion": responses, "label": [0] * 200}
    kind = config.OBJECTIVES[loaded.objective].kind
    rows, _ = tokenize_records(
        Dataset.from_dict({"prompt": prompts} | made_up[kind]),
        kind,
        rm.tokenizer,
        rm.settings.encoding,
        False,
    )
    args = RewardConfig(
        str(tmp_path),
        per_device_eval_batch_size=8,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        remove_unused_columns=False,
    )
    trainer = RewardTrainer(
        rm.model, loaded.objective, args=args, train_dataset=rows, processing_class=rm.tokenizer
    )
    found = torch.tensor(trainer.predict(rows).predictions)
    return found[:, :1] if kind == "rankings" else found if found.ndim == 2 else found[:, None]


def test_one_reading_everywhere(five, answered, tiny_tokenizer, tmp_path):
    _, loaded, folder = five
    prompts, responses = answered
    rm = RewardModel.load(folder)
    close = {"abs": 1e-4}
    expected = rm.score(prompts, responses)
    assert len({round(score, 5) for score in expected}) > 20
    for size in (1, 7, 64):
        assert rm.score(prompts, responses, batch_size=size) == pytest.approx(expected, **close)
        assert rm.score(prompts[::-1], responses[::-1], batch_size=size)[::-1] == pytest.approx(
            expected, **close
        )
    part = rm.settings.logit
    assert plain_logits(folder, prompts, responses)[:, part].tolist() == pytest.approx(expected, **close)
    assert trainer_outputs(loaded, folder, prompts, responses, tmp_path)[:, part].tolist() == pytest.approx(
        expected, **close
    )
    source = reward_from_model(
        RewardModel.load(folder)
    )  # PPO's: it is given text, whatever the ids of the policy's tokenizer
    ids = [tiny_tokenizer(text)["input_ids"] for text in responses]
    assert source.score(prompts, responses, completion_ids=ids, ended=[True] * 200) == pytest.approx(
        expected, **close
    )
    if loaded.objective != "classification":
        settings = json.loads((folder / "reward.json").read_text())["encoding"]
        inputs = [
            pipeline_input(settings, rm.tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)
        ]
        found = pipeline("text-classification", model=str(folder))(inputs)
        assert [row["score"] for row in found] == pytest.approx(expected, **close)


def test_what_is_measured(five):
    _, loaded, folder = five
    metrics = json.loads((folder / "metrics.json").read_text())
    assert next(iter(metrics)) == config.OBJECTIVES[loaded.objective].kind  # what it learned from comes first
    assert {"accuracy", "accuracy_longer", "calibration"} <= metrics["comparisons"].keys()
    wanted = {
        "rankings": {"kendall_tau", "top_1"},
        "ratings": {"rmse", "spearman"},
        "labels": {"auroc", "f1", "confusion"},
    }
    kind = config.OBJECTIVES[loaded.objective].kind
    assert wanted[kind] <= metrics[kind].keys()


@pytest.fixture(scope="module")
def of(request, tmp_path_factory, tiny_feedback, tiny_gpt2):
    return reward.run(small(request.param, tmp_path_factory.mktemp("runs"), tiny_feedback, tiny_gpt2))


@pytest.mark.parametrize("of", ["gpt2-ranked"], indirect=True)
def test_normalize_centres_on_the_reference_sample(of, tiny_feedback):
    rm = RewardModel.load(of)
    rows = load_from_disk(str(tiny_feedback / "rankings"))["validation"]
    prompts = [
        prompt for prompt, answers in zip(rows["prompt"], rows["responses"], strict=True) for _ in answers
    ]
    found = rm.score(prompts, [answer for answers in rows["responses"] for answer in answers], normalize=True)
    assert sum(found) / len(found) == pytest.approx(0, abs=1e-4)
    assert math.sqrt(sum(score**2 for score in found) / len(found)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("of", ["toxicity"], indirect=True)
def test_the_reward_is_the_good_classes_logit_and_probabilities_are_there_too(of, answered):
    rm = RewardModel.load(of)
    prompts, responses = (column[:10] for column in answered)
    logits = rm.logits(prompts, responses)
    assert rm.model.config.id2label == {0: "nothate", 1: "hate"}
    assert rm.score(prompts, responses) == pytest.approx(logits[:, 0].tolist())
    softmax = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in logits.tolist()]
    assert [row["nothate"] for row in rm.probabilities(prompts, responses)] == pytest.approx(
        softmax, abs=1e-5
    )
    assert [sum(row.values()) for row in rm.probabilities(prompts, responses)] == pytest.approx([1.0] * 10)
    rm.settings.output = "log_odds"
    assert rm.score(prompts, responses) == pytest.approx((logits[:, 0] - logits[:, 1]).tolist(), abs=1e-5)


def test_the_source_s_own_snippet_reads_the_acceptance_model(answered, tiny_feedback, tiny_gpt2, tmp_path):
    """Its card: GPT-2's tokenizer, which has no pad token, pad = EOS, padding on the right, truncation on the
    left at 256.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2, pad_token=None)
    shutil.copytree(tiny_gpt2, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    of = reward.run(small("gpt2-acceptance", tmp_path, tiny_feedback, tmp_path / "base"))
    candidates = [f"{p} {r}" for p, r in zip(*(column[:9] for column in answered), strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(of)
    model = AutoModelForSequenceClassification.from_pretrained(of)
    tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.truncation_side = "left"
    tokenizer.padding_side = "right"
    tokens = tokenizer(
        candidates,
        return_tensors="pt",
        return_attention_mask=True,
        padding="longest",
        truncation=True,
        max_length=256,
    )
    rewards = model(**tokens).logits[:, 0]
    rm = RewardModel.load(of)
    assert rewards.tolist() == pytest.approx(rm.score(*(column[:9] for column in answered)), abs=1e-4)
    # Cut on the left: what stands before the last 96 tokens does not count.
    assert rm.score(["x " * 300 + "tail"], ["end"]) == pytest.approx(
        rm.score(["y " + "x " * 300 + "tail"], ["end"]), abs=1e-5
    )


@pytest.mark.parametrize("of", ["bert-regression"], indirect=True)
def test_alpha_multiplies_and_token_types_are_left_out(of, answered):
    rm = RewardModel.load(of)
    prompts, responses = (column[:5] for column in answered)
    assert rm.settings.alpha == 1.0
    assert rm.score(prompts, responses, alpha=10) == pytest.approx(
        [10 * score for score in rm.score(prompts, responses)]
    )
    assert set(AutoTokenizer.from_pretrained(of)("a", "b")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("of", ["distilbert-ranked"], indirect=True)
def test_score_response(of):
    rm = RewardModel.load(of)
    prompt, response = "Explain a rainbow.", "Water splits light."
    inputs = rm.tokenizer(prompt, response, return_tensors="pt", truncation=True, max_length=512)
    assert rm.score_response(prompt, response) == pytest.approx(rm.model(**inputs).logits.item(), abs=1e-5)


def test_a_recipe_scores_alike_as_messages(five, answered):
    _, _, folder = five
    rm = RewardModel.load(folder)
    prompts, responses = (column[:5] for column in answered)
    as_messages = (
        [[{"role": "user", "content": p}] for p in prompts],
        [[{"role": "assistant", "content": r}] for r in responses],
    )
    assert rm.score(*as_messages) == pytest.approx(rm.score(prompts, responses), abs=1e-5)
    assert completion_text(as_messages[1][0]) == responses[0]
