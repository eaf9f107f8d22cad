"""sft: what is trained, what is published, what a wrong input gets."""

import json
import shutil
from operator import add

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import config
from pipeline.artifacts.files import hash_files
from pipeline.artifacts.manifest import read_manifest
from pipeline.errors import UserError
from pipeline.models.chat import encode_turn
from pipeline.models.ends import declared_ends, end_token_ids
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.prepare import stage as prepare
from pipeline.sft import stage as sft
from tests.models.manners import save_llama

STEPS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


def stage(tiny_records, tmp_path, model, **more):
    return config.SFTStage(
        run="t",
        runs=str(tmp_path),
        model=str(model),
        records=str(tiny_records),
        max_length=96,
        training=STEPS,
        **more,
    )


def test_only_completion_tokens_carry_loss(tiny_tokenizer):
    row = {"prompt": "Name the capital of Italy.", "completion": "The capital of Italy is Rome."}
    given = stage("records", "runs", "base")
    found = sft.tokenize_demonstrations(given, Dataset.from_list([row]), tiny_tokenizer, "rows")[0]
    prompt, turn = encode_turn(tiny_tokenizer, row["prompt"], row["completion"])
    assert found["labels"][: len(prompt)] == [-100] * len(prompt)
    assert found["labels"][len(prompt) :] == found["input_ids"][len(prompt) :] == turn
    assert found["labels"][-1] == tiny_tokenizer.eos_token_id


def rows_with(*completions):
    return Dataset.from_list([{"prompt": "Name a fruit.", "completion": text} for text in completions])


@pytest.mark.parametrize(
    ("overlong", "ends"),
    [("truncate_left", [True, True, False]), ("truncate_right", [True, False, False]), ("drop", [True])],
)
def test_a_cut_response_does_not_end(tmp_path, capsys, overlong, ends):
    tokenizer = load_tokenizer(str(save_llama(tmp_path, "qwen")))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    data = rows_with("An apple.", "An apple. An apple.", "An apple. " * 20)
    longest = sum(map(len, encode_turn(tokenizer, "Name a fruit.", data[1]["completion"]))) - 1
    given = stage("records", "runs", "base", overlong=overlong).model_copy(update={"max_length": longest})
    rows = sft.tokenize_demonstrations(given, data, tokenizer, "train")
    assert [row["labels"][-2] == end for row in rows] == ends
    assert max(len(row["input_ids"]) for row in rows) <= longest
    assert capsys.readouterr().out == f"  train: over max_length={longest} (overlong: {overlong}): 2 of 3\n"


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    tokenizer = load_tokenizer(str(save_llama(tmp_path, "gemma")))
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a fruit."}]
    data = Dataset.from_list([{"prompt": system, "completion": "An apple."}])
    with pytest.raises(UserError, match=r"^train: row 0: the chat template refuses .* no system turn; ch"):
        sft.tokenize_demonstrations(stage("records", "runs", "base"), data, tokenizer, "train")


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_policy_declares_how_its_template_ends_a_turn(tiny_records, tmp_path, lora):
    base = save_llama(tmp_path / "base", "qwen-base")
    folder = sft.run(stage(tiny_records, tmp_path, base, lora=lora))
    tokenizer = load_tokenizer(str(folder))
    expected = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert declared_ends(str(folder)) == expected
    assert end_token_ids(load_policy(str(folder), tokenizer), tokenizer) == expected


def test_a_base_that_cannot_read_the_rows_is_refused(
    tiny_records, tiny_gpt2, tiny_encoders, tiny_tokenizer, tmp_path
):
    """An encoder sees the tokens that it is to predict: its loss would fall, and its samples be noise."""
    encoder = shutil.copytree(tiny_encoders["roberta"], tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(encoder)
    with pytest.raises(UserError, match="RobertaForCausalLM sees the tokens that it is to predict"):
        sft.run(stage(tiny_records, tmp_path, encoder))
    long = stage(tiny_records, tmp_path, tiny_gpt2).model_copy(update={"max_length": 129})
    with pytest.raises(UserError, match="reads at most 128 tokens, but max_length is 129; lower it"):
        sft.run(long)


def test_full_training_publishes_a_plain_checkpoint_that_learned(tiny_records, tiny_gpt2, tmp_path):
    folder = sft.run(stage(tiny_records, tmp_path, tiny_gpt2))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = torch.tensor(
        [add(*encode_turn(tokenizer, "Name the capital of Italy.", "The capital of Italy is Rome."))]
    )
    with torch.no_grad():
        assert model(ids, labels=ids).loss < before(ids, labels=ids).loss


def test_the_same_seed_twice_gives_the_same_bits(tiny_records, tmp_path):
    scratch = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 300}
    folders = [sft.run(stage(tiny_records, tmp_path / name, "scratch", scratch=scratch)) for name in "ab"]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
    other = sft.run(stage(tiny_records, tmp_path / "c", "scratch", scratch=scratch, seed=1))
    assert (other / "model.safetensors").read_bytes() != (folders[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_lora_publishes_the_adapter_and_names_its_base(tiny_records, tiny_llama, tmp_path, quantization):
    folder = sft.run(stage(tiny_records, tmp_path, tiny_llama, lora={"r": 4}, quantization=quantization))
    assert not (folder / "model.safetensors").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_llama)
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_an_adapter_names_the_commit_of_a_base_from_the_hub(tiny_records, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pipeline.artifacts.hub.is_hub_id", lambda source: source == str(tiny_llama)
    )  # a folder stands for the repository
    monkeypatch.setattr(
        "pipeline.artifacts.hub.resolve_commit", lambda hub_id, revision, *_: {"v1": "c0ffee"}[revision]
    )
    folder = sft.run(stage(tiny_records, tmp_path, tiny_llama, lora={"r": 4}, revision="v1"))
    assert PeftConfig.from_pretrained(folder).revision == "c0ffee"
    manifest = read_manifest(folder)
    assert (
        manifest["inputs"]["model"]["revision"] == manifest["fingerprint"]["config"]["revision"] == "c0ffee"
    )


def test_an_adapter_that_cannot_be_loaded_is_named(tiny_records, tiny_llama, tiny_tokenizer, tmp_path):
    folder = sft.run(stage(tiny_records, tmp_path, tiny_llama, lora={"r": 4}))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="sft: cannot be loaded as a LoRA adapter"):
        load_policy(str(folder), tiny_tokenizer)


def test_a_base_that_cannot_be_loaded_is_named(tiny_records, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="base: cannot be loaded as a"):
        sft.run(stage(tiny_records, tmp_path, tmp_path / "base"))


def test_records_of_others_are_left_as_they_were(tiny_records, tiny_gpt2, tmp_path):
    records = shutil.copytree(tiny_records / "demonstrations", tmp_path / "records")
    before = hash_files(records)
    sft.run(stage(records, tmp_path, tiny_gpt2))
    assert hash_files(records) == before


def test_records_without_demonstrations_are_refused_by_name(tiny_records, tiny_gpt2, tmp_path):
    records = tmp_path / "records"
    Dataset.from_list([{"prompt": "a", "answer": "b"}]).save_to_disk(str(records))
    with pytest.raises(UserError, match="need a column 'completion'; found prompt, answer"):
        sft.run(stage(records, tmp_path, tiny_gpt2))


def test_without_a_validation_split_it_trains_all_the_same(tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = [{"format": "demonstrations", "path": str(tmp_path / "d.jsonl")}]
    prepare.run(
        config.PrepareStage(run="t", runs=str(tmp_path), source=source, splits={"validation": 0, "test": 0.2})
    )
    overrides = [
        f"runs={tmp_path}",
        "scratch={layers: 1, width: 16, heads: 2, vocabulary: 300}",
        "max_length=64",
        "training.max_steps=2",
    ]
    folder = sft.run(config.load("sft", config.RECIPES / "demo/sft.yaml", overrides, run="t"))
    assert json.loads((folder / "manifest.json").read_text())["metrics"] == {}


def test_rows_beyond_the_default_length_of_trl_are_whole(tiny_records, tmp_path, monkeypatch):
    """TRL cuts rows at 1,024 tokens unless it is told another length."""
    lengths = []

    def trained(trainer, work):
        lengths.extend(len(ids) for ids in trainer.train_dataset["input_ids"])
        raise UserError("enough")

    data = {"train": rows_with("An apple. " * 600), "validation": rows_with()}
    monkeypatch.setattr(sft, "open_records", lambda *_: data)
    monkeypatch.setattr(sft, "train_with_resume", trained)
    size = config.Scratch(layers=1, width=8, heads=1, vocabulary=257, positions=4096)
    given = stage(tiny_records, tmp_path, "scratch", scratch=size).model_copy(update={"max_length": 3000})
    with pytest.raises(UserError, match="enough"):
        sft.run(given)
    assert lengths == [3000]
