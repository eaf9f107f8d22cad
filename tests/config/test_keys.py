"""A key that is text keeps what was typed, and a key of a section is found by its name."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.config.keys import keys_in_sections, reads_text
from pipeline.errors import UserError

TEXT = [
    ("ppo", "gold.source"), ("ppo", "reward.source"), ("ppo", "reward.0.source"), ("ppo", "rollouts.url"),
    ("ppo", "evaluation.scorer.source"), ("evaluate", "measures.x.source"),
    ("prepare", "source.columns.prompt"), ("prepare", "source.0.classes"),
    ("sft", "revision"), ("sft", "run"),
]  # fmt: skip
NOT_TEXT = [
    ("ppo", "reward"), ("ppo", "merge"), ("reward", "seed"), ("reward", "class_weights"),
    ("reward", "encoding.eos"), ("reward", "training.x"), ("prepare", "source.values.a"),
    ("reward", "none.x"), ("prepare", "source"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "key"), [*TEXT, *NOT_TEXT])
def test_the_schema_says_which_keys_are_text(stage: str, key: str) -> None:
    assert reads_text(config.STAGES[stage], key.split(".")) == ((stage, key) in TEXT)


@pytest.mark.parametrize(
    ("stage", "overrides", "key", "expected"),
    [
        ("reward", ["objective=classification", "positive_label=true"], "positive_label", "true"),
        ("reward", ["objective=classification", "positive_label=No"], "positive_label", "No"),
        ("reward", ["objective=classification", "positive_label=1"], "positive_label", "1"),
        ("reward", ["objective=classification", "positive_label=null"], "positive_label", None),
        ("reward", ["objective=classification", "positive_label='\"a\"'"], "positive_label", '"a"'),
        ("sft", ["revision=1e5"], "revision", "1e5"),
        ("sft", ["run=007"], "run", "007"),
        ("sft", ["model=0x1F"], "model", "0x1F"),
        ("sft", ["max_length=64"], "max_length", 64),
    ],
)
def test_an_override_of_a_text_is_what_was_typed(
    stage: str, overrides: list[str], key: str, expected: Any, tmp_path: Path
) -> None:
    (tmp_path / f"{stage}.yaml").write_text("model: a")
    assert getattr(config.load(stage, tmp_path / f"{stage}.yaml", overrides), key) == expected


def test_each_item_of_a_list_of_texts_is_what_was_typed(tmp_path: Path) -> None:
    (tmp_path / "prepare.yaml").write_text("source: {format: labels, path: a.csv}")
    loaded = config.load("prepare", tmp_path / "prepare.yaml", ["source.classes=[no, yes, 2.50]"])
    assert loaded.source[0].classes == ["no", "yes", "2.50"]


def test_a_text_in_a_file_needs_quotes(tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text("model: a\nobjective: classification\npositive_label: yes")
    with pytest.raises(UserError) as error:
        config.load("reward", tmp_path / "reward.yaml")
    assert str(error.value).endswith(
        "positive_label=true: expected text, which YAML reads so in quotes: '\"true\"' on the command line"
    )


@pytest.mark.parametrize(
    ("stage", "key", "full"),
    [
        ("sft", "learning_rate", "training.learning_rate"),
        ("reward", "lora_alpha", "lora.lora_alpha"),
        ("reward", "form", "encoding.form"),
        ("ppo", "kl_coef", "training.kl_coef"),
        ("ppo", "keep", "evaluation.keep"),
        ("prepare", "path", "source.path"),
        ("evaluate", "learning_rate", None),
    ],
)
def test_a_key_of_a_section_is_found_by_its_name(
    stage: str, key: str, full: str | None, tmp_path: Path
) -> None:
    assert keys_in_sections(config.STAGES[stage], stage).get(key) == full
    (tmp_path / f"{stage}.yaml").write_text(f"{key}: 1")
    with pytest.raises(UserError) as error:
        config.load(stage, tmp_path / f"{stage}.yaml")
    assert str(error.value).endswith(f"unknown key '{key}'" + (f"; did you mean '{full}'?" if full else ""))
