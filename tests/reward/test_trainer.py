"""The trainer against `trl.RewardTrainer`'s own loss, and each thing that TRL 1.16 gets wrong or refuses."""

import itertools
import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline import RewardModel, config
from pipeline.errors import UserError
from pipeline.models.heads import head_module_names
from pipeline.models.loading import head_config, load_classifier, load_tokenizer
from pipeline.reward import metrics
from pipeline.reward import stage as reward
from pipeline.reward.dataset import tokenize_records
from pipeline.reward.encoding import Encoding
from pipeline.reward.trainer import RewardTrainer

pytestmark = pytest.mark.long

CHAT = Encoding(max_length=96)
FORMS = {
    "full": [],
    "lora": ["lora.r=4", "lora.target_modules=all-linear"],
    "8bit": ["lora.r=4", "lora.target_modules=all-linear", "quantization=8bit"],
    "4bit": ["lora.r=4", "lora.target_modules=all-linear", "quantization=4bit"],
}
PROMPTS = [f"What is {n}?" for n in range(17)]
PAIRS = Dataset.from_dict(
    {
        "prompt": PROMPTS,
        "chosen": [f"It is {n}." for n in range(17)],
        "rejected": ["You fool. " * (n % 3 + 1) for n in range(17)],
    }
)


def arguments(folder, **more):
    plain = {
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
    }
    return trl.RewardConfig(
        str(folder), **plain | {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8} | more
    )


def of_pairs(base, folder, pairs=PAIRS, peft_config=None, **more):
    """(our trainer, TRL's own) on the same pairs from the same weights."""
    found = []
    for cls in (RewardTrainer, trl.RewardTrainer):
        tokenizer = load_tokenizer(str(base))
        torch.manual_seed(0)
        model = load_classifier(str(base), tokenizer, head=head_config(["reward"], "regression"))
        rows, _ = tokenize_records(pairs, "comparisons", tokenizer, CHAT, False)
        if cls is trl.RewardTrainer:
            ids = {
                side: [row["ids"][i] for row in rows] for i, side in enumerate(("chosen_ids", "rejected_ids"))
            }
            rows = Dataset.from_dict(
                ids | ({"margin": rows["margin"][:]} if "margin" in rows.column_names else {})
            )
        objective = {"objective": "pairwise"} if cls is RewardTrainer else {}
        options = {
            "args": arguments(folder, max_length=None, **more),
            "train_dataset": rows,
            "eval_dataset": rows,
            "peft_config": peft_config,
        }
        found.append(cls(model, processing_class=tokenizer, **objective, **options))
    return found


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "more", [{}, {"center_rewards_coefficient": 0.05}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_pairs_train_as_trl_trains_them(tiny_gpt2, tmp_path, more):
    rows = PAIRS.add_column("margin", [n / 10 for n in range(17)])
    ours, theirs = of_pairs(
        tiny_gpt2, tmp_path, rows, max_steps=6, learning_rate=1e-3, logging_steps=1, **more
    )
    assert ours.share_prefixes
    assert losses(ours) == pytest.approx(losses(theirs), abs=2e-5)
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=5e-4, rtol=0)


def test_accuracy_is_over_rows(tiny_gpt2, tmp_path):
    """TRL: 17 rows at batch 8 with one wrong, alone in its batch: (1 + 1 + 0) / 3 = 0.667."""
    ours, theirs = of_pairs(tiny_gpt2, tmp_path)
    scores = torch.tensor(ours.predict(ours.eval_dataset).predictions)
    right = (scores[:, 0] > scores[:, 1]).tolist()
    order = sorted(range(17), key=lambda i: not right[i])
    flip = [i for i in order[:16] if not right[i]] + ([order[16]] if right[order[16]] else [])

    def swap(row, i):
        return row | ({"chosen": row["rejected"], "rejected": row["chosen"]} if order[i] in flip else {})

    ours, theirs = of_pairs(tiny_gpt2, tmp_path, PAIRS.select(order).map(swap, with_indices=True))
    assert ours.evaluate()["eval_accuracy"] == pytest.approx(16 / 17)
    assert theirs.evaluate()["eval_accuracy"] == pytest.approx(2 / 3)


def test_label_smoothing_counts(tiny_gpt2, tmp_path):
    ours, theirs = of_pairs(tiny_gpt2, tmp_path, label_smoothing_factor=0.25)
    scores = torch.tensor(ours.predict(ours.eval_dataset).predictions)
    difference = (scores[:, 0] - scores[:, 1]).double()
    plain, flipped = (torch.log1p(torch.exp(-sign * difference)).mean().item() for sign in (1, -1))
    assert ours.evaluate()["eval_loss"] == pytest.approx(0.75 * plain + 0.25 * flipped, abs=1e-5)
    assert theirs.evaluate()["eval_loss"] == pytest.approx(plain, abs=1e-5)


def test_votes_count_by_their_share(tiny_gpt2, tmp_path):
    shares = [1.0, 0.75, 0.5, *[2 / 3] * 14]
    ours, _ = of_pairs(tiny_gpt2, tmp_path, PAIRS.add_column("preference", shares))
    scores = torch.tensor(ours.predict(ours.eval_dataset).predictions)
    difference = (scores[:, 0] - scores[:, 1]).double()
    won, lost = (torch.log1p(torch.exp(-sign * difference)) for sign in (1, -1))
    share = torch.tensor(shares, dtype=torch.double)
    evaluated = ours.evaluate()
    assert evaluated["eval_loss"] == pytest.approx((share * won + (1 - share) * lost).mean().item(), abs=1e-5)
    right = [difference[i] > 0 for i in range(17) if shares[i] != 0.5]  # a tie has no winner
    assert evaluated["eval_accuracy"] == pytest.approx(sum(right).item() / 16)


def test_a_classifier_learns_the_shares_of_votes(tiny_gpt2, tmp_path):
    tokenizer = load_tokenizer(str(tiny_gpt2))
    model = load_classifier(str(tiny_gpt2), tokenizer, head=head_config(["no", "yes"], "classification"))
    columns = {"prompt": ["p", "q"], "completion": ["a", "b"], "label": [1, 0]}
    labels = Dataset.from_dict(columns | {"label_shares": [[0.25, 0.75], None]})
    rows, _ = tokenize_records(labels, "labels", tokenizer, CHAT, False)
    trainer = RewardTrainer(
        model, "classification", args=arguments(tmp_path), train_dataset=rows, processing_class=tokenizer
    )
    loss, outputs = trainer.compute_loss(trainer.model, trainer._collate(list(rows)), return_outputs=True)
    logs = outputs["logits"].log_softmax(-1)
    expected = -(0.25 * logs[0, 0] + 0.75 * logs[0, 1] + logs[1, 0]) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_rows_may_be_grouped_by_length(tiny_gpt2, tmp_path):
    ours, theirs = of_pairs(tiny_gpt2, tmp_path, max_steps=2, train_sampling_strategy="group_by_length")
    ours.train()
    assert ours.state.global_step == 2
    with pytest.raises(ValueError, match="lengths"):
        theirs.train()


def test_an_encoder_without_eos_reads_a_prompt_and_an_answer_apart(tiny_encoders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoders["bert"])
    assert tokenizer.eos_token is None
    model = AutoModelForSequenceClassification.from_pretrained(tiny_encoders["bert"], num_labels=1)
    with pytest.raises(TypeError):
        trl.RewardTrainer(model, args=arguments(tmp_path), train_dataset=PAIRS, processing_class=tokenizer)
    rows, _ = tokenize_records(
        PAIRS, "comparisons", tokenizer, Encoding("pair", eos=False, max_length=96), False
    )
    assert tokenizer.decode(rows[3]["ids"][0]) == "[CLS]What is 3?[SEP]It is 3.[SEP]"
    trainer = RewardTrainer(
        model,
        "pairwise",
        args=arguments(tmp_path, max_steps=1),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    assert math.isfinite(trainer.evaluate(rows)["eval_loss"])


def test_no_pair_is_dropped_in_silence_or_cut_into_two_equal_texts(tiny_tokenizer):
    long = Dataset.from_dict(
        {
            "prompt": ["Why?", "Why? " * 60, "Why?"],
            "chosen": ["Because.", "Because.", "word " * 200 + "end"],
            "rejected": ["No.", "No.", "word " * 200 + "fin"],
        }
    )
    kept, counts = tokenize_records(long, "comparisons", tiny_tokenizer, CHAT, drop=False)
    assert counts == {"cut": 1, "alike once cut": 1}
    assert len(kept) == 2
    assert all(chosen != rejected for chosen, rejected in kept["ids"])
    kept, counts = tokenize_records(long, "comparisons", tiny_tokenizer, CHAT, drop=True)
    assert (len(kept), counts) == (1, {"dropped": 1, "alike once cut": 1})


def test_two_answers_of_one_rank_may_be_alike(tiny_tokenizer):
    tied = Dataset.from_dict(
        {"prompt": ["q"], "responses": [["word " * 300, "word " * 301, "No."]], "ranks": [[1, 1, 2]]}
    )
    assert tokenize_records(tied, "rankings", tiny_tokenizer, CHAT, drop=False)[1] == {"cut": 1}


@pytest.mark.parametrize(("kind", "field"), [("comparisons", "margin"), ("ratings", "rating")])
def test_a_number_that_is_none_would_ruin_the_weights(tiny_tokenizer, kind, field):
    columns = {
        "comparisons": {"chosen": ["a", "a"], "rejected": ["b", "b"]},
        "ratings": {"completion": ["a", "a"]},
    }[kind]
    rows = Dataset.from_dict({"prompt": ["p", "q"], **columns, field: [0.5, math.nan]})
    with pytest.raises(UserError, match=f"{kind}: row 1: {field} is nan, expected a finite number"):
        tokenize_records(rows, kind, tiny_tokenizer, CHAT, drop=False)


def test_a_missing_margin_trains_as_zero(tiny_tokenizer):
    rows = Dataset.from_dict(
        {"prompt": ["p", "q"], "chosen": ["a", "a"], "rejected": ["b", "b"], "margin": [0.5, None]}
    )
    kept, _ = tokenize_records(rows, "comparisons", tiny_tokenizer, CHAT, drop=False)
    assert kept["margin"][:] == [0.5, 0.0]


def test_a_preference_that_is_no_share_is_refused(tiny_tokenizer):
    rows = Dataset.from_dict({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"], "preference": [1.5]})
    with pytest.raises(
        UserError, match=r"comparisons: row 0: preference is 1\.5, expected a share from 0 to 1"
    ):
        tokenize_records(rows, "comparisons", tiny_tokenizer, CHAT, drop=False)


def test_lora_trains_the_head_whatever_the_config_says(tiny_gpt2, tmp_path):
    without = LoraConfig(r=2)
    _, theirs = of_pairs(tiny_gpt2, tmp_path, peft_config=without)
    assert not any(
        "score" in name for name, parameter in theirs.model.named_parameters() if parameter.requires_grad
    )
    ours, _ = of_pairs(tiny_gpt2, tmp_path, peft_config=LoraConfig(r=2, task_type=TaskType.SEQ_CLS))
    assert any(
        "score" in name for name, parameter in ours.model.named_parameters() if parameter.requires_grad
    )
    with pytest.raises(UserError, match=r"lora.task_type is set by the stage"):
        reward.check(config.RewardStage(run="t", model="m", lora={"task_type": "CAUSAL_LM"}))


def test_what_comes_after_the_pretrained_part_is_trained_under_lora():
    found = {}
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 100,
    }
    for name in ("deberta-v2", "roberta", "distilbert", "bert"):
        made = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **size))
        found[name] = head_module_names(made)
    assert found == {
        "deberta-v2": ["classifier", "pooler"],
        "roberta": ["classifier"],
        "distilbert": ["classifier", "pre_classifier"],
        "bert": ["classifier", "pooler"],
    }


def test_a_base_that_is_an_adapter_is_merged_first(tiny_gpt2, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(
        r=2,
        task_type=TaskType.CAUSAL_LM,
        init_lora_weights=False,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    )
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), lora)
    policy.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path)
    tokenizer, head = load_tokenizer(str(tmp_path)), head_config(["reward"], "regression")
    merged = load_classifier(str(tmp_path), tokenizer, head=head)
    ids = torch.tensor([[5, 6, 7, 8]])

    def hidden(model):
        return model(ids, output_hidden_states=True).hidden_states[-1]

    bare = load_classifier(str(tiny_gpt2), tokenizer, head=head)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    torch.testing.assert_close(hidden(merged), hidden(policy.eval()), atol=1e-5, rtol=1e-5)
    assert (hidden(merged) - hidden(bare)).abs().max() > 1e-2
    with pytest.raises(
        UserError,
        match=(
            "is a LoRA adapter, and merging it into a quantized base loses precision; set quantization: none"
        ),
    ):
        load_classifier(str(tmp_path), tokenizer, head=head, quantization="8bit")


def test_lora_that_finds_no_modules_is_one_line(tiny_feedback, tiny_encoders, tmp_path):
    with pytest.raises(
        UserError, match=r"reward: lora: .*target_modules.*; try lora\.target_modules=all-linear"
    ):
        reward.run(stage(tiny_feedback, tmp_path, tiny_encoders["distilbert"], "ranking", "lora={}"))


def test_a_base_that_reads_padding_trains_in_batches_of_one_length(tiny_tokenizer, tmp_path, monkeypatch):
    """FNet mixes all tokens, padding too. A sharded launch needs one batch, and refuses it."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    ids = {"vocab_size": len(tiny_tokenizer), "pad_token_id": tiny_tokenizer.pad_token_id}
    rows, _ = tokenize_records(PAIRS, "comparisons", tiny_tokenizer, CHAT, False)

    def make(batch):
        torch.manual_seed(0)
        config_of = AutoConfig.for_model("fnet", num_labels=1, **size, **ids)
        model = AutoModelForSequenceClassification.from_config(config_of)
        args = arguments(tmp_path, per_device_eval_batch_size=batch, max_length=None)
        data = {"train_dataset": rows, "eval_dataset": rows}
        return RewardTrainer(model, "pairwise", args=args, processing_class=tiny_tokenizer, **data)

    together, alone = make(17), make(1)
    assert not together.padding
    scores = [trainer.predict(rows).predictions for trainer in (together, alone)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)

    build = trl.RewardTrainer.__init__

    def build_sharded(self, *arguments, **options):
        build(self, *arguments, **options)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(trl.RewardTrainer, "__init__", build_sharded)
    with pytest.raises(UserError, match="padding changes the scores of this base, but a sharded launch pads"):
        make(1)


def test_what_trl_would_change_behind_the_encoding_is_refused():
    with pytest.raises(UserError, match=r"reward: training.pad_token: it would change the base's tokenizer"):
        reward.check(config.RewardStage(run="t", model="m", training={"pad_token": "<pad>"}))


@pytest.mark.parametrize("ranks", [[0, 1, 2], [1, 2]])
def test_foreign_ranks_that_cannot_be_meant_are_refused(ranks, tiny_tokenizer):
    rows = Dataset.from_dict({"prompt": ["p"], "responses": [["a", "b", "c"]], "ranks": [ranks]})
    with pytest.raises(
        UserError,
        match=r"rankings: row 0: ranks are \[.*\] for 3 responses; expected one for each, 1 the best",
    ):
        tokenize_records(rows, "rankings", tiny_tokenizer, CHAT, drop=False)


def stage(records, runs, model, objective, *more):
    overrides = [
        f"objective={objective}",
        f"model={model}",
        f"records={records}",
        f"runs={runs}",
        "max_length=96",
        "training.max_steps=2",
    ]
    overrides += [
        "training.per_device_train_batch_size=4",
        "training.eval_strategy=no",
        "training.learning_rate=1e-2",
        *more,
    ]
    overrides += ["positive_label=nothate"] if objective == "classification" else []
    return config.load("reward", config.RECIPES / "demo" / "reward.yaml", overrides)


BACKBONES = ("llama", "bert", "distilbert")
OBJECTIVES = ("pairwise", "ranking", "plackett_luce", "classification", "regression")


@pytest.mark.parametrize(
    ("objective", "architecture", "form"),
    # What is adapted or quantized is the same for all objectives of one output.
    [
        *itertools.product(OBJECTIVES, BACKBONES, ["full"]),
        *itertools.product(["pairwise", "classification"], BACKBONES, list(FORMS)[1:]),
    ],
)
def test_every_objective_on_every_backbone_in_every_form(
    objective, architecture, form, tiny_feedback, tiny_llama, tiny_encoders, tmp_path
):
    base = tiny_llama if architecture == "llama" else tiny_encoders[architecture]
    folder = reward.run(stage(tiny_feedback, tmp_path, base, objective, *FORMS[form]))
    rm = RewardModel.load(folder)
    prompts, answers = PROMPTS[:4], [f"It is {n}." for n in range(4)]
    scores = rm.score(prompts, answers)
    assert len(set(scores)) == 4
    if form in ("full", "lora"):
        again = AutoModelForSequenceClassification.from_pretrained(folder)
        assert again.config.pad_token_id == rm.tokenizer.pad_token_id  # TRL's cannot score a batch of two
        assert RewardModel(again, rm.tokenizer, rm.settings).score(prompts, answers) == pytest.approx(
            scores, abs=1e-5
        )
    if form == "lora":
        adapter = AutoPeftModelForSequenceClassification.from_pretrained(
            folder / "adapter", num_labels=len(rm.settings.outputs), ignore_mismatched_sizes=True
        )
        adapter.get_base_model().config.pad_token_id = rm.tokenizer.pad_token_id
        assert RewardModel(adapter, rm.tokenizer, rm.settings).score(prompts, answers) == pytest.approx(
            scores, abs=1e-4
        )


def test_an_ensemble_of_heads_shares_one_backbone(tiny_feedback, tiny_gpt2, tmp_path):
    folder = reward.run(
        stage(tiny_feedback, tmp_path, tiny_gpt2, "ranking", "ensemble=4", "uncertainty_penalty=0.5")
    )
    rm = RewardModel.load(folder)
    members = rm.logits(PROMPTS, ["It is so."] * 17)
    assert members.shape == (17, 4)
    assert members.std(1).min() > 0
    expected = members.mean(1) - 0.5 * members.std(1, correction=0)
    assert rm.score(PROMPTS, ["It is so."] * 17) == pytest.approx(expected.tolist(), abs=1e-5)


def test_each_member_learns_from_rows_of_its_own(tiny_gpt2, tmp_path):
    tokenizer = load_tokenizer(str(tiny_gpt2))
    model = load_classifier(str(tiny_gpt2), tokenizer, head=head_config(["a", "b"], "regression"))
    rows, _ = tokenize_records(PAIRS, "comparisons", tokenizer, CHAT, False)
    rows = rows.add_column("members", [[n % 2 == 0, False] for n in range(17)])
    trainer = RewardTrainer(
        model, "pairwise", args=arguments(tmp_path), train_dataset=rows, processing_class=tokenizer
    )
    inputs = trainer._collate([rows[i] for i in range(4)])
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    grad = trainer.model.score.weight.grad
    assert grad[0].abs().sum() > 0
    assert grad[1].abs().sum() == 0
    only = trainer._collate([rows[i] | {"members": [True, False]} for i in (0, 2)])
    assert 2 * loss.item() == pytest.approx(2 * trainer.compute_loss(trainer.model, only).item(), abs=1e-6)


def test_figures_of_an_evaluation_are_those_of_the_metrics(tiny_gpt2, tmp_path):
    ours, _ = of_pairs(tiny_gpt2, tmp_path)
    scores = ours.predict(ours.eval_dataset).predictions
    found = ours.evaluate()
    expected = metrics.ranking_metrics(scores, [[1, 2]] * 17)
    assert {name: found[f"eval_{name}"] for name in ("kendall_tau", "top_1", "accuracy")} == pytest.approx(
        {name: expected[name] for name in ("kendall_tau", "top_1", "accuracy")}
    )


def test_what_it_takes_from_trl_is_there():
    """`_prepare_dataset` is private and overridden; a model of several outputs is refused in `__init__` and
    nowhere else.
    """
    assert callable(trl.RewardTrainer._prepare_dataset)
    assert "num_labels" in trl.RewardTrainer.__init__.__code__.co_consts
