"""The code that the model card prints computes the reward; its tables hold what was logged and measured."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from bitsandbytes.functional import has_avx512bf16

from pipeline import RewardModel, config
from pipeline.artifacts.schema import NOT_IDENTITY
from pipeline.formatting.markdown import format_place
from pipeline.reward import stage as reward
from pipeline.reward.card import describe_base, front_matter, reward_lines, source_table, training_table
from pipeline.reward.encoding import Encoding, encode_response
from pipeline.reward.settings import RewardSettings

CLASSES = {"objective": "classification", "positive_label": "nothate"}
MADE = {  # what tells each model from a pairwise one that reads a chat
    "chat": {
        "model": "gpt2",
        "training": {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "logging_steps": 5},
    },
    "pair": {"model": "bert", "objective": "regression"},
    "concatenation": {
        "model": "gpt2",
        **CLASSES,
        "encoding": {"form": "concatenation", "separator": " | ", "eos": True},
    },
    "ensemble": {"model": "gpt2", "objective": "plackett_luce", "ensemble": 3, "uncertainty_penalty": 0.5},
    "log_odds": {
        "model": "roberta",
        **CLASSES,
        "reward_output": "log_odds",
        "encoding": {"token_types": False},
    },
    "right": {
        "model": "gpt2",
        "lora": {"r": 4, "lora_alpha": 8},
        "overlong": "truncate_right",
        "max_length": 40,
    },
    "4bit": {"model": "llama", "lora": {"r": 4}, "quantization": "4bit"},
}
EXAMPLE = ("What is the capital of France?", "The capital of France is Paris.")


@pytest.fixture(scope="module", params=MADE)
def made(request, tmp_path_factory, tiny_feedback, tiny_gpt2, tiny_llama, tiny_encoders):
    """(name, folder, text of the card) of a small model; the working directory is that of its run."""
    models = {"gpt2": tiny_gpt2, "llama": tiny_llama, **tiny_encoders}
    given = {"max_length": 96, "records": str(tiny_feedback), **MADE[request.param]}
    given["training"] = {
        "max_steps": 3,
        "per_device_train_batch_size": 64,
        "learning_rate": 1e-2,
    } | given.get("training", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("place"))
        folder = reward.run(
            config.RewardStage(run=request.param, **given | {"model": str(models[given["model"]])})
        )
        yield request.param, folder, (folder / "README.md").read_text()


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def table(text, *head):
    """The rows under a table's head, as text."""
    found = text.split(f"| {' | '.join(head)} |\n", 1)[1].split("\n\n")[0].splitlines()
    return [[part.strip() for part in line[1:-1].split(" | ")] for line in found[1:]]


@pytest.mark.parametrize("asked", ["as printed", "too long", "no prompt"])
def test_the_code_computes_the_reward(made, asked):
    name, folder, text = made
    plain, ours = blocks(text)
    assert len(plain.splitlines()) == {"4bit": 14, "ensemble": 7, "pair": 5}.get(name, 6)
    assert len(ours.splitlines()) == 2
    rm, (question, answer) = RewardModel.load(folder), EXAMPLE
    repeats = (1, 9) if name == "right" else (20, 1)
    texts = {
        "as printed": EXAMPLE,
        "too long": (question * repeats[0], answer * repeats[1]),
        "no prompt": ("", answer),
    }[asked]
    assert encode_response(rm.tokenizer, rm.settings.encoding, *texts).overlong == (asked == "too long")
    for example, given in zip(EXAMPLE, texts, strict=True):
        plain = plain.replace(json.dumps(example), json.dumps(given))
    scope = {}
    exec(plain, scope)
    assert (scope["prompt"], scope["response"]) == texts
    # On CPUs with AVX512-BF16 plain bitsandbytes multiplies 4-bit weights in bfloat16; this package does not.
    rounded = name == "4bit" and has_avx512bf16()
    assert scope.pop("reward") == pytest.approx(rm.score_response(*texts), abs=5e-3 if rounded else 1e-4)
    exec(ours, scope)
    assert scope["reward"] == rm.score_response(*texts)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("output", "penalty"),
    [("logit", 0), ("log_odds", 0), ("probability", 0), ("ensemble", 0), ("ensemble", 0.5)],
)
def test_every_output_is_read_as_the_settings_say(output, penalty, sign):
    names, how = ["a", "b", "c"], Encoding(form="pair")
    settings = RewardSettings(
        outputs=names, encoding=how, output=output, logit=1, sign=sign, uncertainty_penalty=penalty
    )
    logits = torch.tensor([[0.3, -1.2, 2.5]])
    scope = {"inputs": {}, "model": lambda: SimpleNamespace(logits=logits)}
    exec("\n".join(reward_lines(settings)), scope)
    assert scope["reward"] == pytest.approx(settings.reward(logits).item())


def test_the_summary_ends_the_card_and_neither_says_when_or_where(made, tmp_path_factory):
    _, folder, text = made
    assert text.endswith((folder / "summary.md").read_text())
    assert re.findall("^## (.*)", text, re.M) == [
        "How to load it",
        "Data",
        "Architecture",
        "Training",
        "Evaluation",
        "Limits",
    ]
    assert str(tmp_path_factory.getbasetemp()) not in text
    assert not re.search(r"runtime|per_second|20\d\d-\d\d|\{\{|\{%|None|\n\n\n", text)
    assert {"README.md", "summary.md"} <= NOT_IDENTITY
    assert yaml.safe_load(text.split("---")[1]) == {
        "pipeline_tag": "text-classification",
        "library_name": "transformers",
        "tags": ["reward-model", "trl"],
    }


def test_the_hub_is_told_the_base():
    of_hub = config.RewardStage(run="t", model="openai-community/gpt2")
    assert yaml.safe_load(front_matter(of_hub))["base_model"] == "openai-community/gpt2"
    assert "base_model" not in yaml.safe_load(front_matter(config.RewardStage(run="t", model="scratch")))


def test_the_data_are_those_of_the_manifests(made, tiny_feedback):
    _, folder, text = made
    rows = json.loads((folder / "manifest.json").read_text())["rows"]
    fates = list(dict.fromkeys(fate for counts in rows.values() for fate in counts))
    assert table(text, "split", *fates) == [
        [split, *(str(counts.get(fate, 0)) for fate in fates)] for split, counts in rows.items()
    ]
    prepared = json.loads((tiny_feedback / "manifest.json").read_text())["rows"]["by_source"]["demo"]
    (source,) = table(text, "source", "rows read", "kept", "merged", "quarantined")
    assert source[:4] == ["demo", *(f"{prepared[name]:,}" for name in ("read", "kept", "merged"))]
    assert source[4] == ", ".join(f"{reason} {count}" for reason, count in prepared["quarantined"].items())


def test_what_was_measured_is_there_with_its_intervals(made):
    _, folder, text = made
    metrics = json.loads((folder / "metrics.json").read_text())
    sections = re.split("^### (.*)\n", text.split("## Evaluation")[1].split("## Limits")[0], flags=re.M)
    assert [name.lower() for name in sections[1::2]] == list(metrics)
    for figures, section in zip(metrics.values(), sections[2::2], strict=True):
        rows = {row[0]: row[1:] for row in table(section, "metric", "value", "95 % interval")}
        assert len(rows) == sum(isinstance(value, int | float) for value in figures.values())
        if "accuracy" in figures:
            low, high = figures["accuracy_interval"]
            assert rows["accuracy"] == [f"{figures['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"]
        if "pairs" in figures:
            assert list(rows)[:4] == ["pairs", "prompts", "accuracy", "accuracy of “longer wins”"]
            assert rows["accuracy of “longer wins”"][0] == f"{figures['accuracy_longer']:.3f}"
        if "confusion" in figures:
            counts = [[truth, *map(str, called.values())] for truth, called in figures["confusion"].items()]
            assert table(section, "true class", "predicted nothate", "predicted hate") == counts


def test_the_losses_are_those_of_the_log(made):
    name, folder, text = made
    log = [json.loads(line) for line in (folder / "log.jsonl").open()]
    if name != "chat":
        assert table(text, "step", "training loss", "validation loss") == [
            ["3", f"{log[-1]['train_loss']:.4f}", "–"]
        ]
        return
    logged, evaluated = ([entry[key] for entry in log if key in entry] for key in ("loss", "eval_loss"))
    assert [entry["step"] for entry in log if "loss" in entry] == [5, 10]  # and an epoch has 7
    expected = [
        [str(epoch), f"{loss:.4f}", f"{held_out:.4f}"]
        for epoch, loss, held_out in zip((1, 2), logged, evaluated, strict=True)
    ]
    assert table(text, "epoch", "training loss", "validation loss") == expected


def test_a_training_loss_is_the_mean_since_the_row_before():
    log = [
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 4.0},
        {"step": 3, "eval_loss": 2.5, "epoch": 1.0},
        {"step": 4, "loss": 0.5},
    ]
    assert training_table(log).rows == [["1", "2.0000", "2.5000"]]
    assert training_table([entry for entry in log if "loss" in entry]).rows == [
        ["2", "1.0000", "–"],
        ["3", "4.0000", "–"],
        ["4", "0.5000", "–"],
    ]
    started = [{"step": 0, "eval_loss": 3.0, "epoch": 0}, {"step": 5, "eval_loss": 2.0, "epoch": 0.5}]
    assert training_table(started) == (
        "Losses",
        ("step", "training loss", "validation loss"),
        [["0", "–", "3.0000"], ["5", "–", "2.0000"]],
    )


def test_a_long_log_is_told_in_twenty_rows():
    rows = training_table([{"step": step, "loss": float(step)} for step in range(1, 101)]).rows
    assert [row[0] for row in rows] == [str(step) for step in range(5, 101, 5)]
    assert rows[0][1:] == ["3.0000", "–"]
    assert rows[-1][1:] == ["98.0000", "–"]


def test_the_limits_are_those_of_the_objective(made):
    name, _, text = made
    limits = text.split("## Limits")[1]
    said = [("Only differences" in limits), ("not identified" in limits), ("extrapolates" in limits)]
    assert said == [name in ("chat", "ensemble", "right", "4bit"), name == "concatenation", name == "pair"]
    cut = {
        "concatenation": "its beginning.",
        "right": "the end of the response, and the end of the prompt if that alone is too long.",
    }
    usual = "the beginning of the prompt, and the end of the response if that alone is too long."
    assert f"a longer input loses {cut.get(name, usual)}" in limits


def test_paths_are_told_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {
        "runs/t": "runs/t",
        tmp_path / "runs" / "t": "runs/t",
        tmp_path.parent / "elsewhere": "elsewhere",
        "org/name": "org/name",
    }
    assert [format_place(path) for path in places] == list(places.values())


def test_local_sources_are_numbered_and_those_of_the_hub_named():
    counts = {"read": 4, "kept": 1, "merged": 2, "quarantined": {"duplicate": 1}}
    names = ["/data/a.csv", "org/pairs", "b.csv", "demo"]
    inputs = {"/data/a.csv": {}, "org/pairs": {"hub": "org/pairs"}, "b.csv": {}}
    table = source_table({"inputs": inputs, "rows": {"by_source": dict.fromkeys(names, counts)}})
    assert [row[0] for row in table.rows] == ["local file 1", "org/pairs", "local file 3", "demo"]
    assert table.rows[0][1:] == ["4", "1", "2", "duplicate 1"]
    assert source_table({}) is None


def test_the_base_is_named_if_it_is_on_the_hub(tmp_path):
    def base(**given):
        return describe_base(config.RewardStage(run="t", **given))

    assert base(model="scratch") is None
    assert base(model=str(tmp_path)) == "a local model"
    assert base(model="org/base") == "`org/base`"
    assert base(model="org/base", revision="0123abc") == "`org/base` at revision `0123abc`"
    assert base(model="org/base", revision="my-branch") == "`org/base`"
