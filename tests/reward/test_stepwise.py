"""The objective stepwise: training, and the same score of a step everywhere."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch
import trl
import yaml
from bitsandbytes.functional import has_avx512bf16
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForTokenClassification, AutoTokenizer, OPTConfig, OPTForCausalLM

from pipeline import RewardModel, StepRewards, config
from pipeline.artifacts.inputs import open_external, require_artifact
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.models.scratch import new_classifier, train_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.ppo.backbone import attach_reward_adapter
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.prepare import stage as prepare
from pipeline.reward import stage as reward
from pipeline.reward.dataset import require_contrast, tokenize_records
from pipeline.reward.encoding import Encoding
from pipeline.reward.evaluation import evaluate_reward_model, reference_statistics
from pipeline.reward.functions import reward_from_model
from pipeline.reward.metrics import pair_accuracy
from pipeline.reward.settings import RewardSettings
from pipeline.reward.trainer import RewardTrainer

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


@pytest.fixture(scope="module")
def model(step_records, tmp_path_factory):
    """A model whose scores are what a test says."""
    folder = reward.run(stage(step_records, tmp_path_factory.mktemp("runs"), **FORMS["scratch"]))
    return RewardModel.load(folder)


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("min", 0.25), ("product", 0.125), ("mean", 0.4375), ("last", 0.5)]
)
def test_the_score_of_a_response_aggregates_its_steps(model, monkeypatch, aggregate, expected):
    steps = [[0.5, 0.25, 0.5, 0.5] if aggregate == "mean" else [0.25, 1.0, 0.5]]
    monkeypatch.setattr(model, "_step_scores", lambda *_: steps)
    monkeypatch.setattr(model, "settings", replace(model.settings, aggregate=aggregate, alpha=2.0))
    assert model.score(["Q"], ["a b c"]) == [2 * expected]
    assert model.best_of_n("Q", ["a b c"]) == (0, 2 * expected)


def test_a_step_that_was_cut_has_the_score_of_knowing_nothing(model, caplog):
    response = " ".join(["1+1=2"] * 20)
    (scores,) = model.score_steps(["1+1="], [response])
    whole = model.score_steps(["="], [" ".join(["1+1=2"] * 8)])
    assert len(scores) == 20
    assert 0 < scores.count(0.5) < 20
    assert scores == [score for score in scores if score != 0.5] + [0.5] * scores.count(0.5)
    assert 0.5 not in whole[0]
    assert "1 of 1 inputs are over max_length=64 and were cut" in caplog.text
    rewards = reward_from_model(model).score(["1+1="], [response])[0]
    assert rewards.rewards[-1] == 0.0
    assert rewards.ends[-1] == len(response)


def test_a_separator_that_never_occurs_is_logged_once(model, caplog):
    for _ in range(2):
        assert list(map(len, model.score_steps(PROMPTS, ["7+5=2\n2-3=9"] * 3))) == [1, 1, 1]
    warning = "none of 3 responses contains the separator of steps ' ', so each is one step"
    assert caplog.text.count(warning) == 1


def test_steps_of_messages_and_of_nothing(model):
    messages = [{"role": "assistant", "content": RESPONSES[0]}]
    assert model.score_steps(PROMPTS[:1], [messages]) == model.score_steps(PROMPTS[:1], RESPONSES[:1])
    assert list(map(len, model.score_steps(["Q", "Q"], ["", " "]))) == [1, 1]
    assert model.score_steps([], []) == []
    assert model.score([], []) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits(PROMPTS, RESPONSES), "outputs for each step of a response; use score_steps"),
        (lambda m: m.score_steps(PROMPTS, RESPONSES[:1]), "3 prompts but 1 responses"),
        (lambda m: m.score_steps(["Q"], [[]]), "a response has no steps"),
        (
            lambda m: m.score_steps(["Q"], [["a", 1]]),
            r"responses\[0\]\[1\]: expected the text of a step, found 1",
        ),
        (lambda m: m.score_steps("Q", "R"), "prompts: expected a list of texts"),
    ],
)
def test_a_wrong_call_is_refused(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_model_of_whole_responses_has_no_steps(model, monkeypatch):
    monkeypatch.setattr(model, "settings", replace(model.settings, objective="classification"))
    with pytest.raises(
        UserError, match="the objective classification, which scores whole responses; use score"
    ):
        model.score_steps(PROMPTS, RESPONSES)


def test_the_settings_of_other_objectives_have_no_steps(model, tmp_path):
    RewardSettings().save(tmp_path)
    values = json.loads((tmp_path / "reward.json").read_text())
    assert "aggregate" not in values
    assert "step_separator" not in values["encoding"]
    model.settings.save(tmp_path)
    assert RewardSettings.load(tmp_path) == model.settings
    assert (model.settings.aggregate, model.settings.encoding.step_separator) == ("min", " ")


def test_it_is_evaluated_on_steps_and_on_comparisons(model):
    rows = list(draw_steps(30))
    steps = Dataset.from_list(rows)
    responses = [" ".join(row["completions"]) for row in rows]
    pairs = Dataset.from_dict(
        {"prompt": [row["prompt"] for row in rows], "chosen": responses, "rejected": responses[::-1]}
    )
    found = evaluate_reward_model(model, {"steps": steps, "comparisons": pairs, "labels": steps})
    assert set(found) == {"steps", "comparisons"}
    scores = model.score_steps(steps["prompt"][:], steps["completions"][:])
    right = [label for row in rows for label in row["labels"]]
    flat = [score for row in scores for score in row]
    assert found["steps"]["auroc"] == pytest.approx(roc_auc_score(right, flat))
    won = pair_accuracy(*(model.score(pairs["prompt"][:], pairs[side][:]) for side in ("chosen", "rejected")))
    assert found["comparisons"]["accuracy"] == won
    assert found["steps"]["steps"] == len(flat)


def test_the_reference_sample_has_the_scores_of_responses(model):
    rows = Dataset.from_list(list(draw_steps(30)))
    found = reference_statistics(model, rows)
    scores = model.score(rows["prompt"][:], [" ".join(steps) for steps in rows["completions"]])
    assert found["reward_mean"] == pytest.approx(sum(scores) / 30)
    assert found["length_mean"] == pytest.approx(
        sum(model.lengths([" ".join(s) for s in rows["completions"]])) / 30
    )


def test_every_step_of_an_accumulated_batch_counts_once(step_records, tmp_path):
    """Rows of 1 to 5 steps: two parts of a batch have other numbers of steps."""
    rows = [
        {
            "prompt": row["prompt"],
            "completions": row["completions"][:1] * count,
            "labels": row["labels"][:1] * count,
        }
        for row, count in zip(draw_steps(8), [1, 5, 2, 4, 1, 1, 3, 5], strict=True)
    ]
    weights, losses = [], []
    for size, parts in ((8, 1), (2, 4), (1, 8)):
        torch.manual_seed(0)
        base, tokenizer = new_classifier(
            [" ".join(row["completions"]) + row["prompt"] for row in rows],
            config.Scratch(**SCRATCH),
            "\n",
            RewardSettings(objective="stepwise", outputs=["wrong", "right"]).head,
            AutoModelForTokenClassification,
        )
        data, counts = tokenize_records(
            Dataset.from_list(rows),
            "steps",
            tokenizer,
            Encoding(max_length=64, step_separator=" "),
            drop=False,
        )
        assert not counts
        args = trl.RewardConfig(
            str(tmp_path / f"{size}"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            logging_steps=1,
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            remove_unused_columns=False,
        )
        trainer = RewardTrainer(base, "stepwise", args=args, train_dataset=data, processing_class=tokenizer)
        with torch.no_grad():
            logits = [base(torch.tensor([row["ids"][0]])).logits[0, row["steps"]] for row in data]
        targets = torch.tensor([label for row in data for label in row["target"]])
        expected = torch.nn.functional.cross_entropy(torch.cat(logits), targets).item()
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        assert losses[-1] == pytest.approx(expected, abs=1e-4)
        weights.append(base.classifier.weight.detach().clone())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-5, rtol=0)
    assert (weights[0] - weights[0].mean()).abs().max() > 1e-3


def test_a_step_that_is_cut_is_not_trained_on(tmp_path):
    tokenizer = train_tokenizer([], config.Scratch(vocabulary=260, positions=128), "\n")
    rows = Dataset.from_list([{"prompt": "ab", "completions": ["x", "y"], "labels": [True, False]}])
    how = Encoding(max_length=4, step_separator=" ")  # \nx <|eos|>
    made, counts = tokenize_records(rows, "steps", tokenizer, how, drop=False)
    assert (made[0]["steps"], made[0]["target"], counts) == ([1], [1], {"cut": 1})
    assert tokenize_records(rows, "steps", tokenizer, how, drop=True)[1] == {"dropped": 1}
    long = Dataset.from_list([{"prompt": "ab", "completions": ["wxyz"], "labels": [True]}])
    assert tokenize_records(long, "steps", tokenizer, how, drop=False)[1] == {"dropped": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completions": ["a", "b"], "labels": [True]}, "row 0: 1 labels for 2 steps; expected one for each"),
        ({"completions": [], "labels": []}, "row 0: completions is empty; expected a step or more"),
        (
            {"completions": ["a"], "labels": [2]},
            r"row 0: a step has the label 2; expected true \(right\) or false",
        ),
    ],
)
def test_records_that_prepare_did_not_make(record, message, tiny_tokenizer):
    rows = Dataset.from_list([{"prompt": "Q"} | record])
    with pytest.raises(UserError, match=message):
        tokenize_records(rows, "steps", tiny_tokenizer, Encoding(), drop=False)


def test_steps_of_one_class_teach_nothing():
    with pytest.raises(UserError, match="all 3 steps to train on are right, which teaches nothing"):
        require_contrast("steps", [([1, 1], ["a"]), ([1], ["b"])])
    require_contrast("steps", [([1, 1], ["a"]), ([0], ["b"])])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"positive_label": "right"}, "'positive_label' is only read with objective: classification"),
        ({"class_weights": [1.0, 2.0]}, "'class_weights' is only read with objective: classification"),
        (
            {"ensemble": 2},
            "ensemble: an ensemble of heads is for objectives with one score, not for stepwise",
        ),
        ({"objective": "pairwise"}, "'step_separator' is only read with objective: stepwise"),
        ({"objective": "pairwise", "aggregate": "mean", "encoding": {}}, "'aggregate' is only read with"),
        ({"encoding": {"step_separator": ""}}, "at least 1 character"),
    ],
)
def test_keys_that_do_not_apply_are_refused(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage("r", tmp_path, model="m", **keys)


@pytest.mark.parametrize("key", ["center_rewards_coefficient", "label_smoothing_factor"])
def test_training_keys_that_do_not_apply_are_refused(key, tmp_path):
    with pytest.raises(UserError, match=f"training.{key} is not read with objective: stepwise"):
        reward.check(stage("r", tmp_path, model="m", training={key: 0.1}))


def test_a_token_classifier_without_reward_json_is_refused(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a token classifier without reward.json") as refused:
        RewardModel.load(tmp_path)
    told = re.search(r"\{.*\}", str(refused.value)).group()
    (tmp_path / "reward.json").write_text(told.replace("512", "64"))
    loaded = RewardModel.load(tmp_path)
    responses = [response.replace(" ", "\n") for response in RESPONSES]
    assert list(map(len, loaded.score_steps(PROMPTS, responses))) == [3, 3, 2]
    with pytest.raises(UserError, match="encoding.turn: steps are found in turns of the template alone"):
        RewardModel.load(tmp_path, encoding={"turn": "text"}).score_steps(PROMPTS, responses)


def test_an_architecture_without_a_token_classifier_is_refused(step_records, tmp_path, tiny_tokenizer):
    size = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(vocab_size=len(tiny_tokenizer), **size)).save_pretrained(tmp_path / "opt")
    tiny_tokenizer.save_pretrained(tmp_path / "opt")
    with pytest.raises(UserError, match="opt: .*token classifier") as refused:
        reward.run(stage(step_records, tmp_path, model=str(tmp_path / "opt")))
    assert len(str(refused.value).splitlines()) == 1
