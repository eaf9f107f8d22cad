"""Mutate configs and overrides: one line, or accepted; and what is accepted trains, or is one line."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.cases import Case, Outcome, Section
from benchmarks.faults.mutations import NOT_TEXT, VALUES, Random, change_bytes, mutate_value
from benchmarks.faults.processes import run_cli, scratch_copy
from benchmarks.faults.world import COMMANDS, CONFIGS, OUTPUTS, STAGES, TRAINED_STAGES, World, weights_problem

SHIPPED = Path(__file__).resolve().parents[2] / "configs"
ODD_YAML = {
    "interpolation": "${nothing}",
    "environment": "${oc.env:HOME}",
    "itself": "${training}",
    "missing": "???",
    "infinity": float("inf"),
    "NaN": float("nan"),
    "date": "2020-01-01",
    "long": "x" * 5000,
    "deep": [[[[[[[[[[1]]]]]]]]]],
}
VALUES_OF_YAML = {name: value for name, value in VALUES.items() if not str(value).startswith("@")}
VALUES_OF_YAML |= ODD_YAML | {name: text for name, text in NOT_TEXT.items() if name != "controls"}
LINES = (
    "extends: sft.yaml",
    "extends: [1]",
    "training: !!python/object/apply:os.getcwd []",
    "run: &a [*a]",
    "? [a, b]\n: c",
    "seed: 0\nseed: 1",
    "\tseed: 1",
    "1: 2",
    "null: 1",
    "--- \nrun: a",
    "seed: 0x",
    "run: ${run}",
    "run: '${'",
    "training: {learning_rate: 1e-3, learning_rate: 2}",
    "seed: 1_000",
    "%YAML 9",
    "runs: !!binary aGk=",
)
OVERRIDES = (
    "=",
    "a",
    "=1",
    ".=1",
    "a..b=1",
    "run=",
    "run=..",
    "run=a/b",
    "runs=",
    "seed=1.5",
    "seed=-1",
    "seed=99999999999999999999",
    "training=1",
    "training=",
    "training.=1",
    "training[0]=1",
    "training.a.b.c=1",
    "training={",
    "training=[1",
    "model={}",
    "source.path=x",
    "source[0].path=x",
    "source.0.path=x",
    "source[9].path=x",
    "source=[]",
    "source=x",
    "lora=1",
    "lora.r=-1",
    "lora={r: x}",
    "splits.test=2",
    "splits=${seed}",
    "seed=${oc.env:HOME}",
    "seed=${x",
    "run=\x00",
    "a=\udcff",
    "reward=[1]",
    "reward=a:b",
    "reward.0=x",
    "evaluation.scorer.weight=1",
    "force=maybe",
    "scratch.layers=0",
    "scratch.heads=0",
    "max_length=1e9",
)
TRAINING_VALUES = (
    -1,
    0,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "x",
    None,
    [],
    {},
    True,
    False,
    5,
    0.5,
    -0.5,
    10**30,
)
TRAINING_SECONDS = 120.0
# They say where files go or how long a run is; and 10**30 workers of a data loader are started one by one.
NOT_TRIED = (
    "output_dir",
    "logging_dir",
    "num_train_epochs",
    "max_steps",
    "num_rollouts",
    "total_episodes",
    "dataloader_num_workers",
)


def _changed_file(file: Path, rng: Random) -> str:
    """Mutate a YAML file: a value, a line, or bytes."""
    how = rng.choice(["value", "value", "line", "bytes"])
    if how == "value":
        value, what = mutate_value(yaml.safe_load(file.read_text()), rng, VALUES_OF_YAML)
        file.write_text(yaml.safe_dump(value, allow_unicode=True))
        return what
    if how == "line":
        lines, new = file.read_text().splitlines(), rng.choice(LINES)
        lines.insert(rng.randint(0, len(lines)), new)
        file.write_text("\n".join(lines) + "\n")
        return f"the line {new!r}"
    changed, what = change_bytes(file.read_bytes(), rng)
    file.write_bytes(changed)
    return what


def _config(case: Case, folder: Path, stage: str) -> tuple[list[str], str]:
    return COMMANDS[stage], _changed_file(folder / f"configs/{stage}.yaml", case.random)


def _recipe(case: Case, folder: Path, stage: str) -> tuple[list[str], str]:
    """Mutate a file of a shipped recipe."""
    file = case.random.choice(sorted(SHIPPED.glob(f"*/{stage}.yaml")))
    (folder / "configs" / f"{stage}.yaml").write_text(file.read_text())
    what = _changed_file(folder / f"configs/{stage}.yaml", case.random)
    return COMMANDS[stage], f"{file.parent.name}: {what}"


def _override(case: Case, folder: Path, stage: str) -> tuple[list[str], str]:
    rng = case.random
    keys = [".".join(map(str, place)) for place in _keys(CONFIGS[stage])]
    own = [f"{rng.choice(keys)}={rng.choice(list(VALUES_OF_YAML.values()))}", rng.choice(OVERRIDES)]
    chosen = rng.sample(own, rng.choice([1, 1, 2]))
    return [*COMMANDS[stage], *chosen], "overrides"


def _keys(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, item in value.items() if isinstance(value, dict) else ():
        yield (*at, key)
        yield from _keys(item, (*at, key))


WRITERS: dict[str, Callable[[Case, Path, str], tuple[list[str], str]]] = {
    "config": _config,
    "recipe": _recipe,
    "override": _override,
}


@cache
def _training_fields(stage: str) -> list[str]:
    """Return the names of the arguments of `training:`; those of numbers are drawn four times as often."""
    import trl

    from pipeline import PPOConfig

    cls: Any = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "ppo": PPOConfig}[stage]
    fields = [field for field in dataclasses.fields(cls) if field.init and field.name not in NOT_TRIED]
    numbers = [field for field in fields if type(field.default) in (int, float)]
    return sorted(field.name for field in [*fields, *numbers * 3])


def plan(world: World) -> list[tuple[str, str]]:
    """Every way to write a config for every stage, and settings of `training:`, which are run as well."""
    return [*product(WRITERS, STAGES), *product(["training"] * 3, TRAINED_STAGES)]


def run(case: Case) -> Outcome:
    """Check a config without running it; or set one argument of the trainer, and train."""
    how, stage = case.what
    if how == "training":
        return _train(case, stage)
    outcome = Outcome()
    with scratch_copy(case.folder, case.world.folder, ["configs", "pairs.jsonl"]) as folder:
        argv, what = WRITERS[how](case, folder, stage)
        outcome.command = f"rlhf {' '.join(argv)} --dry-run ({what})"
        result = outcome.saw(run_cli([*argv, "--dry-run"], folder, timeout=60))
        if not result.tracebacks:
            outcome.expect(result.code == 0 or result.is_refusal, f"{how}: {result.summary}")
    outcome.figures["dry runs"] += 1
    outcome.figures["accepted"] += result.code == 0
    return outcome


def _train(case: Case, stage: str) -> Outcome:
    key, value = case.random.choice(_training_fields(stage)), case.random.choice(TRAINING_VALUES)
    text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
    argv = [*COMMANDS[stage], f"training.{key}={text}"]
    outcome = Outcome(f"rlhf {' '.join(argv)}")
    with scratch_copy(case.folder, case.world.folder, case.world.needs(stage)) as folder:
        result = outcome.saw(run_cli(argv, folder, timeout=TRAINING_SECONDS))
        if not result.tracebacks:
            outcome.expect(result.code == 0 or result.is_one_line, f"training.{key}={text}: {result.summary}")
        problem = weights_problem(folder / OUTPUTS[stage])
        outcome.expect(not problem, f"training.{key}={text} publishes {problem}")
    outcome.figures["trained"] += 1
    return outcome


SECTION = Section(
    "configs",
    plan,
    run,
    "{dry runs} configs and overrides, {accepted} accepted; {trained} settings trained with",
    full=500,
    short=60,
)
