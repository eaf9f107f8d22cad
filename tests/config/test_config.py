"""Configs are refused by name before anything heavy is imported, and the shipped ones are right."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import TaskType
from trl import RewardConfig, SFTConfig

from pipeline import config
from pipeline.errors import UserError
from pipeline.ppo import stage as ppo
from pipeline.ppo.config import PPOConfig
from pipeline.training.arguments import build_arguments, build_lora_config, check_training

ARGUMENTS: dict[str, Any] = {
    "sft": lambda _: SFTConfig,
    "reward": lambda _: RewardConfig,
    "ppo": ppo.arguments_class,
}
ROOT = config.RECIPES.parent
SHIPPED = [
    file
    for name in config.recipes()
    for stage in config.STAGES
    if config.find_stage_file(file := config.RECIPES / name / f"{stage}.yaml").exists()
] + [config.RECIPES / "minilm" / "reward.yaml"]


def load(folder: Path, stage: str, text: str, *overrides: str, **common: Any) -> Any:
    file = folder / f"{stage}.yaml"
    file.write_text(text)
    return config.load(stage, file, list(overrides), **common)


def refused(folder: Path, stage: str, text: str, *overrides: str) -> str:
    """The one line with which it is refused."""
    with pytest.raises(UserError) as error:
        load(folder, stage, text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_parses(path: Path, tmp_path: Path) -> None:
    loaded = config.load(path.stem, path)
    assert loaded.folder == Path("runs", path.parent.name, path.stem)
    assert (
        type(loaded)(**loaded.resolved()).resolved() == loaded.resolved()
    )  # an artifact's config.yaml makes it again
    if path.stem in ARGUMENTS:
        built = build_arguments(loaded, ARGUMENTS[path.stem](loaded), tmp_path)
        for key, value in loaded.training.items():
            if key not in (
                "eval_steps",
                "save_steps",
                "logging_steps",
            ):  # PPO rounds these up to whole rollouts
                assert getattr(built, key) == value
        assert built.seed == 0


def test_the_demo_recipe_is_whole() -> None:
    assert {path.stem for path in (config.RECIPES / "demo").iterdir()} == set(config.STAGES)
    assert "demo" in config.recipes()


# What is read


@pytest.mark.parametrize(
    ("text", "override"), [("5e-5", ()), ("'5e-5'", ()), ("1", ("training.learning_rate=5e-5",))]
)
@pytest.mark.parametrize("stage", ARGUMENTS)
def test_5e_5_is_a_number(stage: str, text: str, override: tuple[str, ...], tmp_path: Path) -> None:
    base = "" if stage == "ppo" else "model: some/model\n"
    loaded = load(tmp_path, stage, f"{base}training:\n  learning_rate: {text}\n", *override)
    assert build_arguments(loaded, ARGUMENTS[stage](loaded), tmp_path).learning_rate == 5e-5


def test_overrides_reach_any_depth_and_beat_the_file(tmp_path: Path) -> None:
    text = "model: scratch\nmax_length: 64\nscratch: {layers: 2, width: 8}\n"
    text += "training: {max_steps: 5}\nlora: null\n"
    overrides = (
        "scratch.layers=3",
        "training.max_steps=7",
        "training.lr_scheduler_kwargs.min_lr=1e-6",
        "lora.target_modules=[a,b]",
        "lora.r=2",
    )
    loaded = load(tmp_path, "reward", text, *overrides)
    assert (loaded.scratch.layers, loaded.scratch.width) == (3, 8)
    assert loaded.training == {"max_steps": 7, "lr_scheduler_kwargs": {"min_lr": 1e-6}}
    assert loaded.lora == {"target_modules": ["a", "b"], "r": 2}


@pytest.mark.parametrize(
    "override", ["model", "=x", "", "training.x=[1", "model.x=5", "training=5", "model="]
)
def test_a_bad_override_is_refused(override: str, tmp_path: Path) -> None:
    refused(tmp_path, "sft", "model: some/model", override)


@pytest.mark.parametrize(
    ("text", "overrides", "common", "run", "seed"),
    [
        ("", [], {}, "recipe", 0),
        ("run: file\nseed: 3", [], {}, "file", 3),
        ("run: file\nseed: 3", ["run=given", "seed=4"], {}, "given", 4),
        ("run: file\nseed: 3", ["run=given", "seed=4"], {"run": "flag", "seed": 0}, "flag", 0),
        ("run: file\nseed: 3", [], {"run": None, "seed": None}, "file", 3),
    ],
)
def test_run_and_seed_flag_over_override_over_file_over_recipe(
    text: str, overrides: list[str], common: dict[str, Any], run: str, seed: int, tmp_path: Path
) -> None:
    folder = tmp_path / "recipe"
    folder.mkdir()
    loaded = load(folder, "reward", f"model: ${{runs}}/${{run}}/sft\n{text}", *overrides, **common)
    assert (loaded.run, loaded.seed) == (run, seed)
    assert loaded.folder == Path("runs", run, "reward")
    assert (loaded.model, loaded.records) == (f"runs/{run}/sft", f"runs/{run}/prepare")
    assert "force" not in loaded.resolved()


def test_where_figures_are_told_decides_nothing(tmp_path: Path) -> None:
    loaded = load(tmp_path, "ppo", "run: a\ntraining: {report_to: tensorboard, run_name: mine, kl_coef: 0.1}")
    assert loaded.resolved()["training"] == {"kl_coef": 0.1}
    assert loaded.training["report_to"] == "tensorboard"


def test_inputs_default_to_the_run_unless_named(tmp_path: Path) -> None:
    loaded = load(tmp_path, "ppo", "run: trial\nreward: my.module:score")
    assert (loaded.policy, loaded.records) == ("runs/trial/sft", "runs/trial/prepare")
    assert [each.source for each in loaded.reward] == ["my.module:score"]
    assert [each.source for each in load(tmp_path, "ppo", "run: trial").reward] == ["runs/trial/reward"]


def test_rewards_are_one_or_many(tmp_path: Path) -> None:
    text = "run: trial\nreward: [a, {source: 'm:f', weight: 0.5}]"
    with pytest.raises(
        UserError,
        match="reward: some have a weight and some have none; give each one, or none for their mean",
    ):
        load(tmp_path, "ppo", text)
    loaded = load(tmp_path, "ppo", text.replace("[a,", "[{source: a, weight: 1, positive_label: nice},"))
    assert [(each.source, each.weight, each.positive_label, each.is_function) for each in loaded.reward] == [
        ("a", 1.0, "nice", False),
        ("m:f", 0.5, None, True),
    ]
    with pytest.raises(UserError, match="'uncertainty_penalty' is only read with two rewards or more"):
        load(tmp_path, "ppo", "run: trial\nuncertainty_penalty: 1")
    with pytest.raises(UserError, match=r"unknown key 'reward.0.wieght'; did you mean 'weight'\?"):
        load(tmp_path, "ppo", "run: trial\nreward: {source: a, wieght: 1}")
    assert load(tmp_path, "prepare", "source: {format: demo}").source == [config.Source(format="demo")]


# What is refused


@pytest.mark.parametrize(
    ("stage", "text", "key", "near"),
    [
        ("sft", "model: a\nmax_lenght: 5", "max_lenght", "max_length"),
        ("sft", "modle: a", "modle", "model"),
        ("sft", "model: scratch\nscratch: {layrs: 4}", "scratch.layrs", "layers"),
        ("prepare", "source: {format: demo}\nsplits: {tests: 0.1}", "splits.tests", "test"),
        ("prepare", "source: {format: demo, limti: 3}", "source.0.limti", "limit"),
        (
            "prepare",
            "source: [{format: demo}, {format: labels, path: a, clases: [b]}]",
            "source.1.clases",
            "classes",
        ),
        ("evaluate", "best_fo: 4", "best_fo", "best_of"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(
    stage: str, text: str, key: str, near: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, stage, text)
    assert f"unknown key {key!r}; did you mean {near!r}?" in message
    assert f"{stage}.yaml" in message


@pytest.mark.parametrize(
    ("stage", "text", "expected"),
    [
        ("sft", "model: a\nmax_length: long", "max_length='long': input should be a valid integer"),
        ("sft", "model: a\nmax_length: 1.5", "max_length=1.5: input should be a valid integer"),
        ("sft", "model: a\nseed: -1", "seed=-1: input should be greater than or equal to 0"),
        ("sft", "model: a\ntraining: 5", "training=5: input should be a valid dictionary"),
        ("sft", "{}", "'model' is missing"),
        ("sft", "model: ${nope}", "nope"),
        ("sft", "model: [a", "not readable as YAML"),
        ("sft", "model: a\nmodel: b", "duplicate key model"),
        ("sft", "model: a\n5: b", "5"),
        ("sft", "- a", "sft.yaml"),
        ("reward", "model: a\nobjective: pairwize", "objective='pairwize': input should be 'pairwise'"),
        ("prepare", "source: {format: demos}", "source.0.format='demos': input should be 'demo'"),
        ("prepare", "source: []", "source=[]"),
        ("prepare", "source: {format: demo, path: a}", "format 'demo' takes no path or hub"),
        ("prepare", "source: {format: labels}", "needs either 'path' or 'hub'"),
        ("prepare", "source: {format: labels, path: a, hub: b}", "needs either 'path' or 'hub'"),
        (
            "prepare",
            "source: {format: demo, columns: {prompt: a}}",
            "'columns' is not read with format 'demo' from the demo world",
        ),
        (
            "prepare",
            "source: {format: ratings, path: a, classes: [b]}",
            "'classes' is not read with format 'ratings' from a; remove it",
        ),
        (
            "prepare",
            "source: {format: labels, path: a, revision: b}",
            "'revision' is not read with format 'labels' from a; remove it",
        ),
        (
            "prepare",
            "source: {format: labels, path: a, subset: b}",
            "'subset' is not read with format 'labels' from a; remove it",
        ),
        (
            "prepare",
            "source: {format: labels, path: a, classes: [b, c, b]}",
            "classes ['b', 'c', 'b'] contains a duplicate",
        ),
        ("prepare", "source: {format: demo}\nsplits: {validation: 0.6, test: 0.6}", "splits"),
        ("evaluate", "best_of: 1", "best_of=1"),
        # Combinations
        ("reward", "model: a\nquantization: 8bit", "quantization: 8bit needs a 'lora:' section"),
        ("ppo", "quantization: 4bit", "quantization: 4bit needs a 'lora:' section"),
        ("sft", "model: scratch\nlora: {}", "model: scratch is trained in full"),
        ("sft", "model: a\nmerge: true", "merge: true is only read with a 'lora:' section"),
        ("ppo", "evaluation: {patience: 2}", "evaluation.patience is only read with an evaluation.scorer"),
        (
            "ppo",
            "evaluation: {scorer: {source: a, weight: 2}}\ntraining: {eval_strategy: steps}",
            "evaluation.scorer.weight is not read",
        ),
        (
            "ppo",
            "merge: true\nlora: {}\nquantization: 8bit",
            "merges into a base with quantization: 8bit only approximately; set merge: false",
        ),
        ("sft", "model: a\nscratch: {layers: 2}", "'scratch:' is only read with model: scratch"),
        ("sft", "model: scratch\nquantization: 8bit\nlora: {r: 2}", "model: scratch cannot be quantized"),
        ("sft", "model: scratch\nscratch: {width: 10, heads: 3}", "heads"),
        ("sft", "model: scratch\nmax_length: 512\nscratch: {positions: 128}", "positions"),
    ],
)
def test_wrong_values_and_combinations_are_refused(
    stage: str, text: str, expected: str, tmp_path: Path
) -> None:
    assert expected in refused(tmp_path, stage, text)


def test_a_config_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "sft.yaml"
    binary.write_bytes(b"model: caf\xe9\n")
    for path in (binary, tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match=str(path)):
            config.load("sft", path)


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("training", "lerning_rate", 1e-4, "did you mean 'learning_rate'?"),
        ("training", "max_steps", "ten", "training.max_steps='ten'"),
        ("training", "max_steps", 3.7, "training.max_steps=3.7"),
        ("training", "run_name", 5, "training.run_name=5"),
        ("training", "learning_rate", [1], "training.learning_rate"),
        ("training", "learning_rate", None, "training.learning_rate"),
        ("training", "learning_rate", {"x": 1}, "training.learning_rate"),
        *(
            ("training", key, 1, f"training.{key} is set by the stage")
            for key in ("seed", "bf16", "output_dir", "use_cpu")
        ),
        ("lora", "lora_alpah", 8, "did you mean 'lora_alpha'?"),
        ("lora", "r", "many", "lora.r='many'"),
        ("lora", "task_type", "CAUSAL_LM", "lora.task_type is set by the stage"),
        ("lora", "revision", "main", "lora.revision is set by the stage"),
    ],
)
@pytest.mark.parametrize("stage", ARGUMENTS)
def test_the_librarys_sections_are_checked(
    stage: str, section: str, key: str, value: Any, expected: str
) -> None:
    """pydantic's TypeAdapter of the whole class accepts `lerning_rate`."""
    common = {"run": "x"} if stage == "ppo" else {"run": "x", "model": "a"}
    loaded = config.STAGES[stage](**common, **{section: {key: value}})
    with pytest.raises(UserError) as error:
        check_training(loaded, ARGUMENTS[stage](loaded))
    assert str(error.value).startswith(f"{stage}: {section}.{key}")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kl_estimator", "k4"),
        ("num_rollouts", 0),
        ("score_normalization", "whiten"),
        ("eval_strategy", "often"),
        ("num_train_epochs", 3),
    ],
)
def test_what_ppo_config_cannot_take_is_one_line(key: str, value: Any, tmp_path: Path) -> None:
    """`num_rollouts` decides how long PPO trains, so `num_train_epochs` is refused."""
    with pytest.raises(UserError, match=r"ppo: training\W.*") as error:
        check_training(config.PPOStage(run="x", training={key: value}), PPOConfig)
    assert str(value) in str(error.value) or key in str(error.value)


def test_lora_values_are_read_like_the_others() -> None:
    section = {"r": 4, "lora_alpha": "16", "lora_dropout": "1e-2", "target_modules": "all-linear"}
    loaded = config.SFTStage(run="x", model="a", lora=section)
    check_training(loaded, SFTConfig)
    built: Any = build_lora_config(loaded, TaskType.CAUSAL_LM)
    assert (built.r, built.lora_alpha, built.lora_dropout, built.target_modules) == (
        4,
        16,
        0.01,
        "all-linear",
    )


# Before torch


def test_help_and_config_errors_come_before_torch() -> None:
    code = """
import contextlib, io, sys
import pipeline.artifacts.inputs, pipeline.config, pipeline.cli
codes = []
for argv in (["--help"], ["sft", "--help"], ["sft", "--config", "none.yaml"], ["run", "sft.max_lenght=5"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            codes.append(pipeline.cli.main(argv))
        except SystemExit as error:
            codes.append(error.code)
print(codes, sorted({"torch", "transformers", "trl", "datasets", "peft"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=config.RECIPES.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[0, 0, 2, 2] []"


def test_a_config_extends_another_and_knows_its_own_folder(tmp_path):
    for name, text in {
        "a/prepare.yaml": "source: {format: rankings, path: '${recipe}/answers.csv'}\nsplits: {test: 0.2}",
        "b/prepare.yaml": "extends: ../a/prepare.yaml\nsplits: {test: 0.3}",
        "b/tiny/prepare.yaml": "extends: ../prepare.yaml",
        "c/prepare.yaml": "extends: ../d/prepare.yaml",
        "d/prepare.yaml": "extends: ../c/prepare.yaml",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = config.load("prepare", tmp_path / "b/prepare.yaml")
    assert Path(found.source[0].path).resolve() == tmp_path / "a/answers.csv"
    assert (found.run, found.splits.test, found.splits.validation) == ("b", 0.3, 0.1)
    assert config.load("prepare", tmp_path / "b/tiny/prepare.yaml").run == "b-tiny"
    with pytest.raises(UserError, match="extends itself, by way of"):
        config.load("prepare", tmp_path / "c/prepare.yaml")


def test_ppo_in_full_goes_on_from_a_merged_policy(tmp_path: Path) -> None:
    common = {"run": "t", "runs": str(tmp_path)}
    prepare = config.PrepareStage(source=[{"format": "demo"}], **common)
    for merge in (True, False):
        configs = [
            prepare,
            config.SFTStage(model="a", lora={}, merge=merge, **common),
            config.PPOStage(**common),
        ]
        if merge:
            config.check_run(configs)
        else:
            with pytest.raises(UserError, match="sft publishes a LoRA adapter"):
                config.check_run(configs)


@pytest.mark.parametrize("text", ["critic:\n  on: model\n", "critic: {on: model}", 'critic: {"on": model}'])
def test_the_place_of_the_critic_is_a_key_though_yaml_reads_on_as_true(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, "ppo", text).critic.on == "model"
    for override in ("critic.on=model", "critic={on: model}"):
        assert load(tmp_path, "ppo", "", override).critic.on == "model"
    with pytest.raises(UserError, match=r"unknown key 'critic.where'"):
        load(tmp_path, "ppo", "critic: {where: model}")


def test_new_keys_that_are_left_out_do_not_change_what_older_artifacts_were_made_of():
    reward = config.RewardStage(run="r", model="scratch").resolved()
    assert "aggregate" not in reward
    assert "step_separator" not in reward["encoding"]
    assert "measures" not in config.EvaluateStage(run="r").resolved()
    assert "critic" not in config.PPOStage(run="r").resolved()

    stepwise = config.RewardStage(run="r", model="scratch", objective="stepwise").resolved()
    assert (stepwise["aggregate"], stepwise["encoding"]["step_separator"]) == ("min", "\n")
