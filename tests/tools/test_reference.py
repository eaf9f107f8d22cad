"""The configuration reference and the JSON Schemas equal the classes, and the shipped configs fit them."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from omegaconf import OmegaConf
from trl import RewardConfig, SFTConfig

from pipeline import config
from pipeline.ppo import stage as ppo
from pipeline.ppo.config import PPOConfig
from pipeline.tools.reference import keys as reference
from pipeline.tools.reference import schemas
from pipeline.training.arguments import build_arguments

ARGUMENTS: dict[str, Any] = {
    "sft": lambda _: SFTConfig,
    "reward": lambda _: RewardConfig,
    "ppo": ppo.arguments_class,
}
ROOT = config.RECIPES.parent
FILES = sorted(path for stage in config.STAGES for path in config.RECIPES.rglob(f"{stage}.yaml"))


def errors_of(stage: str, text: str) -> list[str]:
    """The messages with which a stage's schema refuses a config."""
    values = OmegaConf.to_container(OmegaConf.create(text))
    return [
        error.message for error in jsonschema.Draft7Validator(schemas.read_schema(stage)).iter_errors(values)
    ]


@pytest.mark.parametrize("stage", config.STAGES)
def test_every_key_has_one_sentence(stage: str) -> None:
    keys = reference.list_keys(stage)
    assert len({key.name for key in keys}) == len(keys)
    for key in keys:
        assert re.fullmatch(r"[A-Z][^\n]*[^.]\.", key.description), key
        assert len(key.description.split()) <= 25, key
        assert key.type, key


def test_the_reference_has_types_limits_and_defaults() -> None:
    keys = {key.name: key for key in reference.list_keys("ppo")}
    assert keys["max_prompt_tokens"][1:3] == ("integer > 0", "256")
    assert keys["evaluation.scorer.source"][1:3] == ("string", "required")
    assert keys["algorithm"][1:3] == ("`ppo`, `rloo`, `grpo`", '"ppo"')
    assert keys["training.kl_target"][1:3] == ("number or null", "null")
    assert keys["run"][1:3] == ("string", "the folder's name")
    arguments = set(PPOConfig.__annotations__) - {"RESERVED", "TRL_NAMES"}
    assert arguments <= {name.removeprefix("training.") for name in keys}


@pytest.mark.parametrize("stage", config.STAGES)
def test_the_shipped_schemas_are_those_of_the_classes(stage: str) -> None:
    """scripts/write_reference.py writes them."""
    assert schemas.read_schema(stage) == schemas.build_schema(stage)
    jsonschema.Draft7Validator.check_schema(schemas.read_schema(stage))


def test_the_page_of_the_reference_is_that_of_the_classes() -> None:
    """scripts/write_reference.py writes it."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference.format_markdown()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(config.RECIPES)))
def test_every_shipped_config_names_the_schema_that_it_fits(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named
    assert (path.parent / named[1]).resolve() == schemas.SCHEMAS / f"{path.stem}.json"
    assert errors_of(path.stem, text) == []


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("sft", "extends: ../demo/sft.yaml\nmax_length: ${scratch.positions}"),
        (
            "sft",
            "model: a\nseed: '3'\ntraining: {packing: true, learning_rate: '5e-5'}\nlora: {r: 8}",
        ),
        ("prepare", "run: a\nruns: b\nsource: {path: '${recipe}/a.csv'}"),
        ("prepare", "source: [{format: demo}, {format: labels, hub: a/b, columns: {prompt: [a, b]}}]"),
        ("reward", "{}"),
        ("ppo", "reward: http://gpu7:8000"),
        (
            "ppo",
            "reward: {source: a, weight: 2}\ntraining: {kl_coef: 1e-2, kl_target: null, optim: adamw_torch}",
        ),
        ("ppo", "reward: [a, {source: 'm:f'}]\nevaluation: {scorer: b}"),
        ("ppo", "reward: null\nlora: null\nalgorithm: grpo\ntraining: {beta: 0.1, num_generations: 8}"),
        ("evaluate", "scorer: {source: a, positive_label: nice}\nquantization: ${precision}"),
    ],
)
def test_a_schema_accepts_what_the_loader_accepts(stage: str, text: str) -> None:
    assert errors_of(stage, text) == []


@pytest.mark.parametrize(
    ("stage", "text", "expected"),
    [
        ("sft", "max_lenght: 5", "'max_lenght' was unexpected"),
        ("sft", "scratch: {layrs: 4}", "is not valid under any of the given schemas"),
        ("sft", "max_length: long", "'long' is not valid under any of the given schemas"),
        ("sft", "max_length: 3", "3 is not valid under any of the given schemas"),
        ("reward", "objective: pairwize", "'pairwize' is not valid under any of the given schemas"),
        ("ppo", "reward: {source: a, wieght: 1}", "is not valid under any of the given schemas"),
        ("ppo", "training: {kl_estimator: k4}", "'k4' is not valid under any of the given schemas"),
        ("evaluate", "extends: 5", "5 is not of type 'string'"),
    ],
)
def test_a_schema_refuses_what_the_loader_refuses(stage: str, text: str, expected: str) -> None:
    (message,) = errors_of(stage, text)
    assert expected in message


@pytest.mark.parametrize("stage", ARGUMENTS)
def test_the_changed_defaults_are_those_that_training_sets(stage: str, tmp_path: Path) -> None:
    model = {} if stage == "ppo" else {"model": "a"}
    loaded = config.STAGES[stage](run="trial", **model)
    built = build_arguments(
        loaded, ARGUMENTS[stage](loaded), tmp_path, **({"logging_steps": 1} if stage == "ppo" else {})
    )
    described = schemas.describe_training(stage)
    for name in schemas.CHANGED_DEFAULTS:
        default = described[name]["default"]
        if name == "report_to":  # transformers reads "none" as no tracker
            assert (default, built.report_to) == ("none", [])
        elif name == "run_name":
            assert built.run_name == default.replace("${run}", "trial")
        elif (stage, name) == ("ppo", "logging_steps"):
            assert built.logging_steps == 4 == default * built.steps_per_rollout
        else:
            assert getattr(built, name) == default
