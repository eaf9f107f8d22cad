"""The command line's grammar: commands, options, their help (one screen each, with an example), and completion for shells."""

import argparse
import math
import shutil
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import shtab

from pipeline import __version__, config

EPILOG = """examples:
  rlhf run --recipe demo --seed 1
  accelerate launch -m pipeline reward --config configs/demo/reward.yaml
exit codes: 0 done, 1 the machine failed, 2 a mistake in what was given, 130 interrupted"""
EXAMPLES = {
    "run": "rlhf run --recipe demo --until reward --seed 1 reward.training.max_steps=100",
    "prepare": "rlhf prepare --config configs/smollm2/prepare.yaml source.path=pairs.jsonl",
    "sft": "rlhf sft --config configs/demo/sft.yaml training.learning_rate=1e-3",
    "reward": "rlhf reward --config configs/demo/reward.yaml objective=plackett_luce",
    "ppo": "rlhf ppo --config configs/demo/ppo.yaml training.kl_coef=0.1",
    "evaluate": "rlhf evaluate --config configs/demo/evaluate.yaml best_of=64",
    "doctor": "rlhf doctor --config configs/llama-8b-qlora --device-memory 24",
    "show": "rlhf show runs/demo",
    "push": "rlhf push runs/demo/reward --to ORG/NAME --private",
    "score": "rlhf score --reward runs/demo/reward --input answers.csv --output scored.csv",
    "best-of-n": "rlhf best-of-n --reward runs/demo/reward --policy runs/demo/sft --input prompts.jsonl --output best.jsonl",
    "compare": 'rlhf compare --reward runs/demo/reward "Name a fruit." "An apple." "A carrot."',
    "completion": "rlhf completion bash > ~/.local/share/bash-completion/completions/rlhf",
}
HELP = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
_NAMES = " ".join(config.recipes())
COMPLETIONS: dict[str, Any] = dict.fromkeys(("config", "input", "output"), shtab.FILE) | dict.fromkeys(
    ("folder", "other", "reward", "policy", "reads"), shtab.DIRECTORY
)
COMPLETIONS["recipe"] = {
    "bash": "_rlhf_recipes", "zsh": f"({_NAMES})",
    "preamble": {"bash": f'_rlhf_recipes() {{\n  compgen -W "{_NAMES}" -- "$1"\n  compgen -d -- "$1"\n}}'},
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, and knows how its arguments are completed."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if action.dest in COMPLETIONS:
            action.complete = COMPLETIONS[action.dest]  # type: ignore[attr-defined]
        return action


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand anywhere among the options."""
    whole = parser()
    args, rest = whole.parse_known_args(argv)
    if unknown := [item for item in rest if item.startswith("-") or "=" not in item or "overrides" not in args]:
        whole.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    return args


def parser() -> Parser:
    whole = Parser(
        prog="rlhf", usage="rlhf [-h] [--version] COMMAND …", epilog=EPILOG, formatter_class=HELP, add_help=False,
    )  # fmt: skip
    whole.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    whole.add_argument("--version", action="version", version=__version__, help=argparse.SUPPRESS)
    title = "reward models and PPO, stage by stage"
    commands = whole.add_subparsers(title=title, dest="command", required=True, metavar="COMMAND [--help]", prog="rlhf")
    _add_stages(commands)
    shown = commands.add_parser("show", help="the state of a run, what an artifact is, or what differs between two")
    shown.add_argument("folder", help="a run, such as runs/demo, or a stage's folder in it")
    shown.add_argument("other", nargs="?", help="another of the same, to compare")
    shown.add_argument("--verify", action="store_true", help="read every file again, whatever its size and time say")
    _add_push(commands)
    _add_scoring(commands)
    completed = commands.add_parser("completion", help="a script by which a shell completes commands, options and recipes")
    completed.add_argument("shell", choices=("bash", "zsh"))
    for name, command in commands.choices.items():
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.description = _filled(command.description or "")
        command.epilog, command.formatter_class = f"example:\n  {EXAMPLES[name]}", HELP
    return whole


def _add_stages(commands: Any) -> None:
    """The commands that take a recipe's configs, and overrides."""
    recipes = f"Recipes in {config.RECIPES}: {', '.join(config.recipes())}."
    whole = commands.add_parser("run", help="every stage of a recipe", description=recipes)
    whole.add_argument("--recipe", default="demo", help="a recipe's name, or a path to a folder of your own (default: demo)")
    whole.add_argument("--tiny", action="store_true", help="a small model and the demo world's feedback in their place")
    whole.add_argument("--until", default="evaluate", choices=list(config.STAGES), metavar="STAGE", help="stop after it")
    for stage, cls in config.STAGES.items():
        single = commands.add_parser(stage, help=f"the {stage} stage alone", description=cls.__doc__)
        single.add_argument("--config", required=True, type=_file, help=f"its YAML file, such as configs/demo/{stage}.yaml")
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, help="seeds everything")
        command.add_argument("--force", action="store_true", help="run even what is unchanged; drop a partial run")
        command.add_argument("--dry-run", action="store_true", help="check the configs and say what would be written")
    examined = commands.add_parser("doctor", help="a config, its inputs, its data and its memory, before anything loads")
    examined.add_argument("--config", required=True, type=_file, help="a recipe's folder, such as configs/demo, or one of its files")
    above_0 = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
    examined.add_argument("--device-memory", type=above_0, metavar="GB", help="of the device it is for (default: what is here)")
    examined.add_argument("--launch", metavar="NAME", help="by this file of configs/accelerate, which may shard what is trained")
    for command in commands.choices.values():
        command.add_argument("--run", help="name of the run (default: the recipe's)")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")


def _add_push(commands: Any) -> None:
    pushed = commands.add_parser("push", help="a model, its card and what reads it, to the hub")
    pushed.add_argument("folder", help="what sft, reward or ppo wrote, or a ppo's best/")
    pushed.add_argument("--to", required=True, metavar="ORG/NAME", help="a repository, made where there is none")
    pushed.add_argument("--private", action="store_true", help="make it a private one")
    pushed.add_argument("--revision", metavar="BRANCH", help="made where there is none (default: main)")


def _add_scoring(commands: Any) -> None:
    """The commands that use what the stages made; they take no overrides."""
    scored = commands.add_parser("score", help="a file's answers, each with its reward")
    best = commands.add_parser("best-of-n", help="to each prompt of a file the best of n sampled answers")
    compared = commands.add_parser("compare", help="answers to one prompt, best first")
    for command in (scored, best, compared):
        command.add_argument(
            "--reward", required=True, metavar="NAME", help="a reward artifact, a classifier's folder, hub id, or a server's URL"
        )
        command.add_argument("--reads", metavar="NAME", help="folder or hub id of what a server serves, where it does not tell")
        command.add_argument("--positive-label", metavar="NAME", help="of a classifier with several labels the good one")
    best.add_argument("--policy", required=True, metavar="NAME", help="a policy artifact, a model's folder or a hub id")
    for command in (scored, best):
        command.add_argument("--input", required=True, metavar="FILE", help="CSV, TSV, JSON, JSONL or Parquet")
        command.add_argument("--output", required=True, metavar="FILE", help="the same rows with new columns: .csv, .jsonl or .parquet")
        command.add_argument("--force", action="store_true", help="replace an output that exists")
    count = _number(int, lambda value: value > 0, "a whole number above 0")
    scored.add_argument("--batch-size", type=count, default=64, metavar="N", help="answers scored together (default: 64)")
    scored.add_argument("--alpha", type=_number(float, math.isfinite, "a number"), help="scales the rewards (default: the artifact's own)")
    scored.add_argument("--normalize", action="store_true", help="centre and scale on the artifact's reference sample first")
    best.add_argument("--n", type=count, default=16, help="answers to each prompt (default: 16)")
    warm = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
    best.add_argument("--temperature", type=warm, default=0.7, metavar="T", help="(default: 0.7)")
    best.add_argument("--response-tokens", type=count, default=48, metavar="N", help="of an answer at most (default: 48)")
    best.add_argument("--max-prompt-tokens", type=count, default=256, metavar="N", help="the last so many are read (default: 256)")
    best.add_argument("--seed", type=int, default=0, metavar="N", help="seeds the answers, each by its row (default: 0)")
    best.add_argument("--batch-size", type=count, default=32, metavar="N", help="answers sampled together (default: 32)")
    compared.add_argument("prompt", help="what was asked")
    compared.add_argument("answers", nargs="+", metavar="answer", help="two or more; after -- they may begin with a dash")


def _filled(text: str) -> str:
    """As wide as argparse's own lines; `HELP` leaves it as it is, since examples must stay on one line."""
    width = shutil.get_terminal_size().columns - 2
    return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def _file(text: str) -> str:
    """A config's path; `configs/…` means the recipes that came with the package where there is no such folder here."""
    path = Path(text)
    return str(config.RECIPES.joinpath(*path.parts[1:])) if path.parts[:1] == ("configs",) and not Path("configs").exists() else text


def _number(kind: Callable[[str], Any], is_right: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """A type for argparse that says what was expected."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if is_right(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")

    return parse
