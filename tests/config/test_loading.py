"""Whatever a file or an override says, `config.load` returns a config or raises one line."""

import random
from collections import Counter
from pathlib import Path

import pytest
import yaml

from pipeline import cli, config
from pipeline.errors import UserError

RECIPES = ("demo", "toxicity", "gpt2-ranked", "rloo", "llama-8b-qlora")
KEYS = [
    "", ".", "a..b", "[", "]", "run[0]", "key[0]", "source", "source.path", "source.0.path",
    "source[0].path", "source.-1.path", "source.99999999999999999999.path", "source.0", "splits",
    "splits.test", "splits.test.x", "model", "model.x", "training", "training.max_steps",
    "training.learning_rate", "training.optim", "training.lr_scheduler_kwargs.min_lr", "lora",
    "lora.r", "lora.target_modules.0", "scratch", "scratch.layers", "encoding", "encoding.form",
    "extends", "run", "runs", "seed", "reward", "reward.0.weight", "reward.source",
    "evaluation.scorer", "evaluation.scorer.source", "objective", "gold", "prompts",
    "a." * 300 + "a", "ключ", "0", "__class__", "training.__class__", "model_config",
    "class_weights", "records", "max_length", "force", "\udcff", "a b", "_recipe", "temperature",
]  # fmt: skip
VALUES = [
    "", "null", "~", "true", "no", "0", "-1", "1e400", ".nan", "-.inf", "9" * 30, "9" * 5000,
    "0x" + "f" * 50, "1e-4", "2020-01-01", "2020-01-01T00:00:00Z", "12:30:45", "[", "[]", "{}",
    "[1, [2, [3]]]", "{a: {b: {c: 1}}}", "{a: 1, a: 2}", "{1: a}", "{[a]: b}", "{? [x, y] : z}",
    "{null: 1}", "&a [*a]", "*b", "!!set {a, b}", "!!binary aGk=", "!!binary x",
    "!!python/object/apply:os.system [ls]", "!!python/object/apply:pathlib.PosixPath [a]",
    "!!timestamp 2020-01-01", "!!float x", "!!int x", "!!omap [a: 1]", "!x y", "${run}", "${nope}",
    "${", "${}", "${${run}}", "${a:b}", "${run}${", "${oc.env:HOME}", "${oc.env:HF_TOKEN,x}",
    "${oc.${run}:HOME}", "${oc.decode:'{a: 1}'}", "${oc.create:[1]}", "${.run}", "${model}",
    "${training}", "${training.max_steps}", "${source.0.path}", "\\${run}", "???",
    "http://u:p@h/x", "http://[", "http://h:99999", "x:y", "demo:gold", '"\\0"', '"\\ud800"',
    "\udcff", "'", '"', "a: b", "- a\n- b", "a\nb", "#", "@x", "|\n x", ">", "%x", "[" * 300,
    "{a: " * 300, "x" * 5_000, "[" + "1, " * 3000 + "1]", "ok", "scratch", "a=b", "=", "<<: x",
    "{<<: {a: 1}}", "\t", "\r", "\x1b[31m", "é", "demo", "steps",
]  # fmt: skip
FILES = [
    config.find_stage_file(config.RECIPES / name / f"{stage}.yaml")
    for name in RECIPES
    for stage in config.STAGES
]


def mutate(rng: random.Random, text: str) -> str:
    """Cut, insert, repeat or replace something in a YAML text."""
    lines = text.split("\n")
    start, end = sorted(rng.choices(range(len(text)), k=2))
    line, other = rng.choices(range(len(lines)), k=2)
    value = rng.choice(VALUES)
    whole = {
        "cut": text[:start] + text[end:],
        "end": text[:end],
        "insert": text[:start] + value + text[start:],
        "change": text[:start] + rng.choice("[]{}:,&*!|>%@'\"\t #-?=\x07") + text[start + 1 :],
        "repeat": "\n".join([*lines[:line], lines[other], *lines[line:]]),
        "value": "\n".join([*lines[:line], f"{lines[line].split(':')[0]}: {value}", *lines[line + 1 :]]),
        "extra": f"{text}\n{rng.choice(KEYS)}: {value}",
    }
    return whole[rng.choice(sorted(whole))]


def draw(rng: random.Random, folder: Path) -> tuple[Path, list[str]]:
    """Return a recipe's file, mutated every other time, and up to two overrides."""
    file = rng.choice(FILES)
    overrides = [f"{rng.choice(KEYS)}={rng.choice(VALUES)}" for _ in range(rng.randrange(3))]
    if rng.random() < 0.5:
        text = mutate(rng, file.read_text(encoding="utf-8"))
        file = folder / file.name
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    return file, overrides


def test_what_is_not_a_config_is_one_line(tmp_path: Path) -> None:
    """And what is a config can be written and read again."""
    rng, outcomes = random.Random(0), Counter[str]()
    for _ in range(1000):
        file, overrides = draw(rng, tmp_path)
        try:
            loaded = config.load(file.stem, file, overrides)
        except UserError as error:
            message = str(error)
            outcomes["refused"] += "\n" not in message and len(message) < 1500
        else:
            written = yaml.safe_dump(loaded.resolved(), allow_unicode=True)
            assert type(loaded)(**yaml.safe_load(written)).resolved() == loaded.resolved()
            outcomes["read"] += 1
    assert outcomes.total() == 1000
    assert outcomes["read"] > 50


def test_the_command_line_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng, codes = random.Random(1), Counter[int]()
    for _ in range(200):
        stage, recipe = rng.choice(list(config.STAGES)), config.RECIPES / rng.choice(RECIPES)
        key = rng.choice([*KEYS, *config.STAGES[stage].model_fields])
        override = f"{key}={rng.choice(VALUES)}"
        whole = ["run", "--recipe", str(recipe), f"{stage}.{override}"]
        alone = [stage, "--config", str(recipe / f"{stage}.yaml"), override]
        code = cli.main([*rng.choice([whole, alone]), "--dry-run"])
        output = capsys.readouterr()
        assert code in (0, 2), output.err
        assert output.err.count("\n") == (code == 2), output.err
        codes[code] += 1
    assert codes[2] > codes[0] > 5
    assert not list(tmp_path.iterdir())
