"""Classifiers that this project did not make: opened with defaults that are said, or refused."""

import json
import logging
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline import RewardModel, config
from pipeline.errors import UserError
from pipeline.models.loading import head_config, load_classifier, load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.reward import stage as reward
from tests.models.manners import save_llama


def foreign(base, folder, labels, **more):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)}, **more
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def classifier(tiny_encoders, tmp_path):
    """As facebook/roberta-hate-speech-dynabench-r4-target has them."""
    return foreign(tiny_encoders["roberta"], tmp_path / "hate", ["nothate", "hate"])


def test_several_labels_need_the_good_one(classifier, caplog):
    with pytest.raises(
        UserError,
        match=(
            r"has the labels \['nothate', 'hate'\] and no reward.json; name the label whose logit "
            r"is the reward: positive_label="
        ),
    ):
        RewardModel.load(classifier)
    with pytest.raises(UserError, match="positive_label='nice' is none of its labels: nothate, hate"):
        RewardModel.load(classifier, positive_label="nice")
    with caplog.at_level(logging.WARNING):
        rm = RewardModel.load(classifier, positive_label="nothate", encoding={"form": "concatenation"})
    assert "no reward.json; using Encoding(form='pair'" in caplog.text
    inputs = rm.tokenizer("Hello\nYou fool.", return_tensors="pt")
    assert rm.score(["Hello"], ["You fool."]) == pytest.approx(
        [rm.model(**inputs).logits[0, 0].item()], abs=1e-5
    )
    other = RewardModel.load(classifier, positive_label="hate", encoding={"form": "concatenation"})
    assert other.score(["Hello"], ["You fool."]) == pytest.approx(
        [rm.model(**inputs).logits[0, 1].item()], abs=1e-5
    )
    with pytest.raises(
        UserError, match="expected a dict with keys of form, separator, eos, truncation, max_length"
    ):
        RewardModel.load(classifier, positive_label="hate", encoding={"shape": "pair"})


def test_ppo_takes_one(classifier, tiny_feedback, tiny_gpt2, tmp_path):
    steps = {
        "num_rollouts": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_mini_batches": 1,
        "response_tokens": 4,
    }
    common = {"run": "t", "runs": str(tmp_path), "policy": str(tiny_gpt2), "records": str(tiny_feedback)}
    with pytest.raises(UserError, match="name the label whose logit is the reward"):
        ppo.run(config.PPOStage(**common, training=steps, reward=str(classifier)))
    named = {"source": str(classifier), "positive_label": "nothate"}
    folder = ppo.run(config.PPOStage(**common, training=steps, reward=named, force=True))
    assert (folder / "manifest.json").exists()


def test_a_pad_token_that_is_eos_hides_nothing_and_batches_do_not_count(tiny_gpt2, tmp_path):
    """The acceptance model as published: GPT-2, one output, pad = EOS, no chat template."""
    base = tmp_path / "base"
    shutil.copytree(tiny_gpt2, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, None
    tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    folder = foreign(base, tmp_path / "accept", ["LABEL_0"], pad_token_id=tokenizer.eos_token_id)
    rm = RewardModel.load(folder)
    assert (rm.settings.encoding.form, rm.settings.encoding.eos) == ("concatenation", False)
    assert rm.tokenizer.pad_token_id == rm.tokenizer.eos_token_id
    spelled = rm.tokenizer("Hi<|eos|>", split_special_tokens=True)["input_ids"]
    assert rm.encode("", "Hi<|eos|>").ids == spelled  # a text that spells EOS does not end
    rm = RewardModel.load(folder, encoding={"turn": "text"})  # as before, it does
    texts = ["Hello.", "A longer reply, with several words.", "Hi<|eos|>"]  # the last ends with EOS itself
    expected = []
    for text in texts:
        ids = rm.tokenizer(f"Me: hi\n{text}", return_tensors="pt")["input_ids"]
        expected.append(rm.model.score(rm.model.transformer(ids).last_hidden_state[0, -1]).item())
    for size in (1, 2, 64):
        assert rm.score(["Me: hi"] * 3, texts, batch_size=size) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen", "gemma", "llama3", "phi3", "dated", "thinking", "bare"])
def test_a_chat_reward_model_scores_as_its_card_does(family, tmp_path):
    """Render the conversation, tokenize it, take the score of the last token."""
    rm = RewardModel.load(save_llama(tmp_path, family, labels=1))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (rm.settings.encoding.form, rm.settings.encoding.max_length) == ("chat", 256)
    assert rm.settings.encoding.date == ("2026-01-01" if family == "dated" else None)
    texts = ["An apple.", "\nAn apple.\n", "A carrot. A carrot."]
    expected = []
    for text in texts:
        messages = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": text}]
        ids = rm.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            expected.append(plain(ids).logits[0, 0].item())
    assert rm.score(["Name a fruit."] * 3, texts) == pytest.approx(expected, abs=1e-5)


def test_a_model_of_before_keeps_its_encoding_and_its_scores(tmp_path):
    """Its reward.json has no `turn`: the prompt by the template, the text of the response, and EOS."""
    folder = save_llama(tmp_path, "gemma", labels=1)
    encoding = {"form": "chat", "separator": "\n", "eos": True, "truncation": "left", "max_length": 64}
    (folder / "reward.json").write_text(json.dumps({"objective": "pairwise", "encoding": encoding}))
    rm, tokenizer = RewardModel.load(folder), AutoTokenizer.from_pretrained(folder)
    assert rm.settings.encoding.turn == "text"
    for text in ("An apple. ", "<end_of_turn>"):
        turn = [{"role": "user", "content": "Name a fruit."}]
        before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        after = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert rm.encode("Name a fruit.", text).ids == [*before, *after, tokenizer.eos_token_id]


def test_a_prompt_that_the_template_refuses_is_named(tmp_path):
    rm = RewardModel.load(save_llama(tmp_path, "gemma", labels=1))
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    rm.check_prompts(["Q"], "prompts")
    with pytest.raises(UserError, match=r"^prompts: row 1: .* refuses the conversation \(system, user, ass"):
        rm.check_prompts(["Q", system], "prompts")


def test_inputs_that_are_cut_are_logged_once(tmp_path, caplog):
    rm = RewardModel.load(save_llama(tmp_path, "qwen", labels=1), encoding={"max_length": 40})
    caplog.clear()
    rm.score(["Q"] * 3, ["A", "word " * 20, "word " * 21])
    rm.score(["Q"], ["word " * 22])
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "2 of 3 inputs are over max_length=40 and were cut (truncation: left)"
    ]
    assert rm.overlong == 3
    end = rm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert rm.encode("Q", "word " * 20).ids[-2] == end  # what ends a turn is never cut


def test_what_cannot_be_read_is_told_at_once(classifier, tiny_gpt2, tmp_path):
    with pytest.raises(UserError, match=r"encoding\.form='bogus': expected one of chat, pair, concatenation"):
        RewardModel.load(classifier, positive_label="hate", encoding={"form": "bogus"})
    with pytest.raises(UserError, match="has no EOS token"):
        RewardModel.load(classifier, positive_label="hate", encoding={"form": "concatenation", "eos": True})
    # 130 positions of a RoBERTa hold 129 tokens: it counts on from its pad token, whose id is 0 here.
    with pytest.raises(UserError, match="reads at most 129 tokens, but max_length is 512"):
        RewardModel.load(classifier, positive_label="hate", encoding={"max_length": 512})
    with pytest.raises(UserError, match="no reference sample is known for this model and encoding"):
        RewardModel.load(classifier, positive_label="hate").score(["a"], ["b"], normalize=True)
    long = config.RewardStage(run="t", runs=str(tmp_path), model=str(tiny_gpt2), max_length=200, records="r")
    tokenizer = load_tokenizer(str(tiny_gpt2))
    model = load_classifier(str(tiny_gpt2), tokenizer, head=head_config(["reward"], "regression"))
    with pytest.raises(UserError, match="reads at most 128 tokens, but max_length is 200; lower it"):
        reward.choose_encoding(long, model, tokenizer)


def test_one_without_a_head_or_with_another_number_of_outputs_is_refused(
    tiny_encoders, tiny_feedback, tmp_path
):
    with pytest.raises(UserError, match=r"has no reward head \(it lacks classifier"):
        RewardModel.load(tiny_encoders["bert"])
    three = foreign(tiny_encoders["bert"], tmp_path / "three", ["a", "b", "c"])
    with pytest.raises(
        UserError, match="three: cannot be loaded as a sequence classifier with the outputs reward"
    ):
        load_classifier(
            str(three), AutoTokenizer.from_pretrained(three), head=head_config(["reward"], "regression")
        )
    wanted = config.RewardStage(
        run="t", runs=str(tmp_path), model=str(three), records=str(tiny_feedback), objective="classification"
    )
    with pytest.raises(UserError, match="the classes are nothate, hate, and 'positive_label' is not set"):
        reward.run(wanted)
    with pytest.raises(UserError, match="positive_label='good' is none of them"):
        reward.run(wanted.model_copy(update={"positive_label": "good"}))


def test_a_multi_label_classifier_gives_sigmoids(tiny_encoders, tmp_path):
    labels = ["toxic", "obscene", "threat"]
    more = {"problem_type": "multi_label_classification"}
    folder = foreign(tiny_encoders["bert"], tmp_path / "toxic", labels, **more)
    rm = RewardModel.load(folder, positive_label="obscene")
    logits = rm.logits(["Hello."], ["You fool."])
    (found,) = rm.probabilities(["Hello."], ["You fool."])
    assert found == pytest.approx(dict(zip(labels, logits.sigmoid()[0].tolist(), strict=True)))
    expected = {"logit": logits[0, 1], "log_odds": logits[0, 1], "probability": logits.sigmoid()[0, 1]}
    for output, value in expected.items():
        rm.settings.output = output
        assert rm.score(["Hello."], ["You fool."]) == pytest.approx([float(value)])
