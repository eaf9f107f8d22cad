"""The command line's grammar: commands, options, and their help, one screen each with an example."""

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

EPILOG = """\
  accelerate launch -m pipeline reward --config configs/demo/reward.yaml
exit codes: 0 done, 1 the machine or a library failed, 2 a mistake of the user, 130 interrupted"""
EXAMPLES = {
    "run": "rlhf run --recipe demo --run short --until reward reward.training.max_steps=100",
    "init": "rlhf init mine --from demo",
    "prepare": "rlhf prepare --config configs/smollm2/prepare.yaml source.path=pairs.jsonl",
    "sft": "rlhf sft --config configs/demo/sft.yaml training.learning_rate=1e-3 --force",
    "reward": "rlhf reward --config configs/demo/reward.yaml objective=plackett_luce --force",
    "ppo": "rlhf ppo --config configs/demo/ppo.yaml training.kl_coef=0.1 --force",
    "evaluate": "rlhf evaluate --config configs/demo/evaluate.yaml best_of=64 --force",
    "config": "rlhf config ppo training.kl_coef",
    "doctor": "rlhf doctor --config configs/llama-8b-qlora --device-memory 24",
    "show": "rlhf show runs/demo",
    "push": "rlhf push runs/demo/reward --to ORG/NAME --private",
    "score": "rlhf score --reward runs/demo/reward --input answers.csv --output scored.csv",
    "best-of-n": (
        "rlhf best-of-n --reward runs/demo/reward --policy runs/demo/sft "
        "--input prompts.jsonl --output best.jsonl"
    ),
    "generate": "rlhf generate --policy runs/demo/sft --n 2 --input prompts.csv --output answers.csv",
    "label": "rlhf label --reward module:function --input answers.csv --output labels.jsonl",
    "compare": 'rlhf compare --reward runs/demo/reward "Name a fruit." "An apple." "A carrot."',
    "completion": "rlhf completion bash > ~/.local/share/bash-completion/completions/rlhf",
}
HELP = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
_NAMES = " ".join(config.recipes())
FILES = ("config", "input", "output", "inspect")
FOLDERS = ("folder", "folders", "reward", "policy", "reads")
COMPLETIONS: dict[str, Any] = {
    **dict.fromkeys(FILES, shtab.FILE),
    **dict.fromkeys(FOLDERS, shtab.DIRECTORY),
    "recipe": {
        "bash": "_rlhf_recipes",
        "zsh": f"({_NAMES})",
        "preamble": {
            "bash": f'_rlhf_recipes() {{\n  compgen -W "{_NAMES}" -- "$1"\n  compgen -d -- "$1"\n}}'
        },
    },
}


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, and knows how its arguments are completed."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if action.dest in COMPLETIONS:
            action.complete = COMPLETIONS[action.dest]  # type: ignore[attr-defined]
        return action


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; overrides may come anywhere among the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    is_run = args.command == "run"
    if unknown := [
        item
        for item in rest
        if item.startswith("-") or "overrides" not in args or not (is_run or "=" in item)
    ]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    if is_run:
        _read_recipe(parser, args)
    if args.command == "prepare" and bool(args.config) == bool(args.inspect):
        parser.error("prepare needs either --config FILE or --inspect FILE")
    return args


def _read_recipe(parser: Parser, args: argparse.Namespace) -> None:
    """Read a word without `=` in place of an override as the recipe: `rlhf run demo`."""
    names = [item for item in args.overrides if "=" not in item]
    args.overrides = [item for item in args.overrides if "=" in item]
    names += [args.recipe] if args.recipe is not None else []
    if len(set(names)) > 1:
        parser.error(f"run: expected one recipe, found {', '.join(names)}; an override is key=value")
    args.recipe = names[0] if names else "demo"


def build_parser() -> Parser:
    """Build the parser of all commands."""
    parser = Parser(
        prog="rlhf",
        usage="rlhf [-h] [--version] COMMAND …",
        epilog=EPILOG,
        formatter_class=HELP,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__, help=argparse.SUPPRESS)
    title = "reward models and PPO, stage by stage"
    commands = parser.add_subparsers(
        title=title, dest="command", required=True, metavar="COMMAND [--help]", prog="rlhf"
    )
    _add_stages(commands)
    _add_doctor(commands)
    _add_overrides(commands)
    _add_init(commands)
    _add_config(commands)
    _add_show(commands)
    _add_push(commands)
    _add_scoring(commands)
    _add_completion(commands)

    for name, command in commands.choices.items():
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.description = _fill(command.description or "")
        command.epilog, command.formatter_class = f"example:\n  {EXAMPLES[name]}", HELP
    return parser


def _add_stages(commands: Any) -> None:
    """Add `run` and a command for each stage."""
    description = f"Recipes: {', '.join(config.recipes())}."
    run = commands.add_parser("run", help="run every stage of a recipe", description=description)
    run.add_argument(
        "--recipe", help="name of a recipe, or path of a folder (default: demo); `rlhf run demo` works too"
    )
    run.add_argument("--tiny", action="store_true", help="use a small model and the demo world's feedback")
    run.add_argument(
        "--until", default="evaluate", choices=list(config.STAGES), metavar="STAGE", help="last stage to run"
    )
    for stage, cls in config.STAGES.items():
        description = f"{' '.join((cls.__doc__ or '').split())} Keys: rlhf config {stage}."
        single = commands.add_parser(stage, help=f"run the {stage} stage alone", description=description)
        single.add_argument(
            "--config",
            required=stage != "prepare",
            type=_file,
            help=f"YAML file, such as configs/demo/{stage}.yaml",
        )
    commands.choices["prepare"].add_argument(
        "--inspect",
        metavar="FILE",
        help="print what a file or folder looks like and the config that reads it",
    )
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, help="seed of everything random")
        command.add_argument(
            "--force",
            action="store_true",
            help="replace what is there, unchanged or of other settings; discard a partial run",
        )
        command.add_argument(
            "--dry-run", action="store_true", help="check the configs and print the folders to write"
        )


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor", help="check a config, its inputs, data and memory before loading a model"
    )
    doctor.add_argument(
        "--config",
        required=True,
        type=_file,
        help="folder of a recipe, such as configs/demo, or one of its files",
    )
    doctor.add_argument(
        "--device-memory", type=POSITIVE, metavar="GB", help="memory budget in GB (default: this machine's)"
    )
    doctor.add_argument(
        "--launch",
        metavar="NAME",
        help="launch by this file of configs/accelerate, which may shard the weights",
    )


def _add_overrides(commands: Any) -> None:
    """Add the options of all commands that load configs, which are those added before."""
    for name, command in commands.choices.items():
        command.add_argument("--run", help="name of the run (default: the recipe's)")
        overrides = command.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
        if name == "run":  # the recipe may come among them
            overrides.complete = COMPLETIONS["recipe"]


def _add_init(commands: Any) -> None:
    init = commands.add_parser(
        "init",
        help="write a recipe of your own, as a copy of another",
        description="Copy a recipe to a new folder, to change its files and to run it by the folder's name.",
    )
    init.add_argument("name", metavar="NAME", help="folder to write, in this folder or by its path")
    init.add_argument(
        "--from",
        dest="recipe",
        default="demo",
        metavar="RECIPE",
        help=f"recipe to copy, by name or path (default: demo); shipped: {', '.join(config.recipes())}",
    )


def _add_config(commands: Any) -> None:
    reference = commands.add_parser(
        "config",
        help="print the keys of a stage's config, with types and defaults",
        description="Print each key with its type, its default and one sentence.",
    )
    reference.add_argument(
        "stage", choices=list(config.STAGES), metavar="STAGE", help=f"one of {', '.join(config.STAGES)}"
    )
    reference.add_argument(
        "key",
        nargs="?",
        metavar="KEY",
        help="a key or a section, such as training.kl_coef (default: all keys)",
    )
    reference.add_argument("--schema", action="store_true", help="print the JSON Schema, for editors")


def _add_show(commands: Any) -> None:
    show = commands.add_parser(
        "show", help="print the state of a run, an artifact, the difference of two, or a table"
    )
    show.add_argument(
        "folders",
        nargs="+",
        metavar="folder",
        help="a run, such as runs/demo, or a stage's folder in it; two are compared, more make a table",
    )
    show.add_argument(
        "--table", action="store_true", help="a table also of one or two, with means of runs over seeds"
    )
    show.add_argument(
        "--verify", action="store_true", help="hash every file again, even if size and time are unchanged"
    )


def _add_push(commands: Any) -> None:
    push = commands.add_parser("push", help="push a model and its card to the hub")
    push.add_argument("folder", help="artifact of sft, reward or ppo, or the best/ of a ppo")
    push.add_argument(
        "--to", required=True, metavar="ORG/NAME", help="repository; created if it does not exist"
    )
    visibility = push.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="refuse a repository that is public")
    visibility.add_argument(
        "--public", action="store_true", help="create a public repository (default: private)"
    )
    push.add_argument(
        "--revision", metavar="BRANCH", help="branch; created if it does not exist (default: main)"
    )


def _add_scoring(commands: Any) -> None:
    """Add the commands that use the stages' models; they take no overrides."""
    score = commands.add_parser("score", help="score the responses of a file")
    best = commands.add_parser(
        "best-of-n",
        help="generate n responses to each prompt of a file, keep the best",
        usage="%(prog)s --reward NAME --policy NAME --input FILE --output FILE [options]",
    )
    generate = commands.add_parser("generate", help="generate n responses to each prompt of a file")
    label = commands.add_parser(
        "label",
        help="compare the responses that generate wrote, by a reward",
        description="Write a comparison for each pair of a row's responses; prepare reads the output.",
    )
    compare = commands.add_parser("compare", help="rank responses to one prompt, best first")
    for command in (score, best, label, compare):
        _add_reward_options(command)
    for command in (best, generate):
        _add_policy_options(command)
    for command in (score, best, generate, label):
        _add_file_options(command, ("--input", "--prompts") if command is generate else ("--input",))
    for command in (score, best, generate, compare):
        command.add_argument(
            "--overlong",
            choices=("truncate_left", "truncate_right", "drop"),
            default="truncate_left" if command in (best, generate) else None,
            metavar="HOW",
            help="too long: truncate_left, truncate_right or drop",
        )
    _add_score_options(score)
    _add_label_options(label)
    _add_sampling_options(best, n=16)
    _add_sampling_options(generate, n=4)
    compare.add_argument("prompt", help="text of the prompt")
    compare.add_argument(
        "answers",
        nargs="+",
        metavar="answer",
        help="two or more responses; after -- they may begin with a dash",
    )


def _add_reward_options(command: Parser) -> None:
    command.add_argument(
        "--reward",
        required=True,
        metavar="NAME",
        help="a reward artifact, a classifier's folder, a hub id, a server's URL, or module:function",
    )
    command.add_argument(
        "--reads", metavar="NAME", help="folder or hub id of a server's model (default: ask it)"
    )
    command.add_argument("--positive-label", metavar="NAME", help="label whose logit is the reward")


def _add_policy_options(command: Parser) -> None:
    command.add_argument(
        "--policy", required=True, metavar="NAME", help="a policy artifact, a model's folder, or a hub id"
    )
    command.add_argument(
        "--policy-url",
        metavar="URL",
        help="a vLLM server of this policy, which generates (default: here)",
    )


def _add_file_options(command: Parser, names: Sequence[str]) -> None:
    """Add the options of the input, which has these names, and of the output."""
    command.add_argument(*names, required=True, metavar="FILE", help="CSV, TSV, JSON, JSONL or Parquet")
    command.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="the rows with new columns: .csv, .jsonl or .parquet",
    )
    command.add_argument("--force", action="store_true", help="replace an existing output")


def _add_score_options(score: Parser) -> None:
    score.add_argument(
        "--batch-size", type=COUNT, default=64, metavar="N", help="responses scored together (default: 64)"
    )
    score.add_argument("--alpha", type=NUMBER, help="factor of the rewards (default: the artifact's own)")
    score.add_argument(
        "--normalize", action="store_true", help="centre and scale by the artifact's reference sample first"
    )


def _add_label_options(label: Parser) -> None:
    label.add_argument("--pairs", type=COUNT, metavar="N", help="most pairs of a row, drawn (default: all)")
    label.add_argument("--seed", type=int, default=0, metavar="N", help="seed of that draw (default: 0)")


def _add_sampling_options(command: Parser, n: int) -> None:
    command.add_argument("--n", type=COUNT, default=n, help=f"responses to each prompt (default: {n})")
    command.add_argument(
        "--temperature", type=POSITIVE, default=0.7, metavar="T", help="sampling temperature (default: 0.7)"
    )
    command.add_argument(
        "--response-tokens", type=COUNT, default=48, metavar="N", help="maximum new tokens (default: 48)"
    )
    command.add_argument(
        "--max-prompt-tokens",
        type=COUNT,
        default=256,
        metavar="N",
        help="prompt limit in tokens (default: 256)",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed; each row has its own (default: 0)"
    )
    command.add_argument(
        "--batch-size", type=COUNT, default=32, metavar="N", help="responses generated together (default: 32)"
    )


def _add_completion(commands: Any) -> None:
    completion = commands.add_parser(
        "completion", help="print a script with which a shell completes rlhf's words"
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help="shell that reads the script")


def _fill(text: str) -> str:
    """Wrap text to argparse's own width; `HELP` leaves it as it is, since examples must stay on one line."""
    width = shutil.get_terminal_size().columns - 2
    return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def _file(text: str) -> str:
    """Return a config's path; `configs/…` is the package's own folder if there is none here."""
    path = Path(text)
    if path.parts[:1] == ("configs",) and not Path("configs").exists():
        return str(config.RECIPES.joinpath(*path.parts[1:]))
    return text


def _number(
    kind: Callable[[str], Any], is_right: Callable[[Any], bool], expected: str
) -> Callable[[str], Any]:
    """Return a type for argparse whose error names the expected values."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if is_right(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")

    return parse


COUNT = _number(int, lambda value: value > 0, "a whole number above 0")
NUMBER = _number(float, math.isfinite, "a number")
POSITIVE = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
