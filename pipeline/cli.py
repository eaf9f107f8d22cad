"""The command line: argv in, an exit code out. torch is imported only once the arguments and configs are known to be right.

Exit codes: 0 done; 1 the machine failed (disk full, a file that cannot be read); 2 a mistake in what was given; 130 interrupted.
"""

import argparse
import errno
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from pipeline import __version__, config
from pipeline.errors import UserError
from pipeline.ranks import have_joined, is_main_process, join, leave

EXAMPLES = """examples:
  rlhf run --recipe demo                       every stage of a recipe, reusing what is unchanged
  rlhf run --recipe demo --until reward reward.training.max_steps=100
  rlhf ppo --config configs/demo/ppo.yaml training.learning_rate=1e-5
  rlhf doctor --config configs/demo            keys, inputs, template, a batch, memory: before anything loads
  rlhf show runs/demo                          the state of each stage; of two runs, what differs
  rlhf show runs/demo/reward --verify
  rlhf score --reward runs/demo/reward --input answers.csv --output scored.csv
  rlhf compare --reward runs/demo/reward "Name a fruit." "An apple." "A carrot."
  rlhf best-of-n --reward runs/demo/reward --policy runs/demo/sft --input prompts.jsonl --output best.jsonl
  accelerate launch -m pipeline reward --config configs/demo/reward.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        own = {"run": run, "doctor": doctor, "show": show, "score": score, "best-of-n": best_of_n, "compare": compare}
        own.get(args.command, run_stage)(args)
        return 0
    except (KeyboardInterrupt, Exception) as error:
        known = isinstance(error, UserError | KeyboardInterrupt | OSError) or _disk_is_full(error)
        if args.debug or not known:
            raise
        message, code = _explain(error)
        if is_main_process() or have_joined():  # before they join all ranks come upon the same
            print(f"{'error: ' if code != 130 else ''}{message}", file=sys.stderr)
        return code


def entry() -> None:
    """The console script."""
    code = main()
    if code == 0:  # after a failure the others may no longer be there to leave with
        leave()
    sys.exit(code)


def run(args: argparse.Namespace) -> None:
    """All stages of a recipe in order, each config checked before the first stage starts."""
    stages = list(config.STAGES)[: list(config.STAGES).index(args.until) + 1]
    folder = Path(args.recipe) if Path(args.recipe).is_dir() else config.RECIPES / args.recipe
    if not folder.is_dir():
        raise UserError(
            f"--recipe {args.recipe}: no such recipe{config.nearest(args.recipe, config.recipes())}; "
            f"there are: {', '.join(config.recipes())}"
        )
    overrides = _by_stage(args.overrides, args.until, stages)
    common = _common(args)
    files = {stage: folder / f"{stage}.yaml" for stage in stages}
    if args.tiny:
        files = {stage: _tiny(folder, stage) for stage in stages}
        if args.run is None and not any(item.startswith("run=") for item in args.overrides):
            common["run"] = f"{folder.resolve().name}-tiny"
    configs = [config.load(stage, files[stage], overrides[stage], **common) for stage in stages]
    for loaded in configs:
        loaded._recipe = args.recipe + (" --tiny" if args.tiny else "")
    config.check_run(configs)
    _quiet_libraries()
    join()
    for loaded in configs:
        import_module(f"pipeline.{loaded.stage}").check(loaded)
    for loaded in configs:
        if args.dry_run:
            print(f"{loaded.stage}: would write {loaded.folder}")
        else:
            _run(loaded)
    if args.until == "evaluate" and not args.dry_run and is_main_process():
        print(import_module("pipeline.evaluate.summary").table(configs[-1].folder))


def _tiny(folder: Path, stage: str) -> Path:
    """A stage's config in small: the recipe's own, or the demo world's, which every stage but `reward` can do with."""
    file = folder / "tiny" / f"{stage}.yaml"
    if stage == "reward" and not file.exists():
        raise UserError(f"--tiny: {folder} brings no tiny/reward.yaml, the small stand-in for its model; run it without --tiny")
    return file if file.exists() else config.RECIPES / "demo" / f"{stage}.yaml"


def run_stage(args: argparse.Namespace) -> None:
    """One stage from its own config file."""
    loaded = config.load(args.command, args.config, args.overrides, **_common(args))
    _quiet_libraries()
    join()
    import_module(f"pipeline.{loaded.stage}").check(loaded)
    if args.dry_run:
        print(f"{loaded.stage}: would write {loaded.folder}")
    else:
        _run(loaded)


def doctor(args: argparse.Namespace) -> None:
    """A recipe's stages, or one of them, looked at before anything loads."""
    path = Path(args.config)
    folder = path if path.is_dir() else path.parent
    files = {stage: folder / f"{stage}.yaml" for stage in config.STAGES}
    wanted = [stage for stage, file in files.items() if file.exists()] if path.is_dir() else [path.stem]
    if not wanted or wanted[0] not in config.STAGES:
        raise UserError(f"{path}: expected a recipe's folder, or one of its files: {', '.join(f'{stage}.yaml' for stage in config.STAGES)}")
    known = [stage for stage, file in files.items() if stage in wanted or file.exists()]
    overrides = _by_stage(args.overrides, wanted[-1], known)
    recipe = {stage: config.load(stage, files[stage], overrides[stage], run=args.run) for stage in known}
    if "prepare" in recipe:
        config.check_run(list(recipe.values()))
    _quiet_libraries()
    from pipeline.doctor import examine

    wrong = 0
    for stage in wanted:
        found, errors = examine(recipe[stage], recipe, args.device_memory and 1e9 * args.device_memory)
        wrong += errors
        print("\n".join([f"{stage}: {recipe[stage].folder}", *(f"  {what:<10} {text}" for what, text in found)]), flush=True)
    if wrong:
        raise UserError(f"doctor: {wrong} thing{'s are' if wrong > 1 else ' is'} wrong: see the lines that begin with 'error:'")


def show(args: argparse.Namespace) -> None:
    """The state of a run, what an artifact is and was made from, or what differs between two."""
    from pipeline.show import show

    print(show([Path(folder) for folder in (args.folder, args.other) if folder], args.verify))


def score(args: argparse.Namespace) -> None:
    """A file's answers, each with its reward."""
    from pipeline import scoring

    reward = _reward(args)
    work = scoring.read(args.command, Path(args.input), Path(args.output), args.force)
    _quiet_libraries()
    join()
    scoring.score(work, reward, **_given(args, "batch_size", "alpha", "normalize"))


def best_of_n(args: argparse.Namespace) -> None:
    """To each prompt of a file the best of n sampled answers."""
    from pipeline import scoring

    reward = _reward(args)
    work = scoring.read(args.command, Path(args.input), Path(args.output), args.force)
    _quiet_libraries()
    join()
    drawn = _given(args, "n", "temperature", "response_tokens", "max_prompt_tokens", "seed", "batch_size")
    scoring.best_of_n(work, reward, args.policy, **drawn)


def compare(args: argparse.Namespace) -> None:
    """Answers to one prompt, best first."""
    from pipeline import scoring

    reward = _reward(args)
    _quiet_libraries()
    print(scoring.compare(reward, args.prompt, args.answers))


def _reward(args: argparse.Namespace) -> config.Reward:
    given = {"source": args.reward, "positive_label": args.positive_label, "reads": args.reads}
    return config.validate(config.Reward, given, f"--reward {args.reward}")


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _run(loaded: config.StageConfig) -> None:
    if is_main_process():
        print(f"{loaded.stage}: {loaded.folder}", flush=True)
    import_module(f"pipeline.{loaded.stage}").run(loaded)


def _common(args: argparse.Namespace) -> dict[str, object]:
    return {"run": args.run, "seed": args.seed, "force": args.force or None}


def _by_stage(overrides: Sequence[str], until: str, stages: Sequence[str]) -> dict[str, list[str]]:
    """`stage.key=value` goes to its stage; a bare `key=value` to all where it is common to all (`runs`), else to the last one."""
    found: dict[str, list[str]] = {stage: [] for stage in stages}
    for item in overrides:
        stage, dot, rest = item.partition(".")
        if item.partition("=")[0] in config.StageConfig.model_fields:
            for of_stage in found.values():
                of_stage.append(item)
        elif dot and stage in config.STAGES:
            if stage not in found:
                raise UserError(f"override {item!r}: the run ends with {until!r}, before {stage!r}")
            found[stage].append(rest)
        else:
            found[until].append(item)
    return found


def _explain(error: BaseException) -> tuple[str, int]:
    """(one line, exit code)."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was published is untouched, and the same command goes on from the last checkpoint", 130
    if _disk_is_full(error):
        filename = getattr(error, "filename", None)
        place = f" for {filename}" if filename else ""
        return f"no space left on the disk{place}; free some and give the same command again", 1
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}", 1
    return " ".join(str(error).split()), 2


def _disk_is_full(error: BaseException) -> bool:
    """Whether it is for want of space, which safetensors says in words alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def _quiet_libraries() -> None:
    """Progress bars only for a person who watches; no warning that nobody can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # TRL turns checkpointing on by default under its old name, so that it must be turned off under that name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated")
    # So must the sending of buffers before each forward, which reward models turn off themselves; what replaces it still sends them once.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
    # `generate` drops a mask that masks nothing, and then warns of the padding that it writes after an EOS itself.
    _hush("transformers.modeling_utils", "strongly recommend passing in an `attention_mask`")
    # Checkpoints within a second of each other go by their numbers, which is their order.
    _hush("transformers.trainer_utils", "mtime may not be reliable on this filesystem")
    # Weights that are tied to the embeddings are saved once.
    _hush("transformers.trainer", "missing keys in the checkpoint model loaded: ['lm_head.weight'].")
    import datasets
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()


def _hush(logger: str, message: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: message not in record.getMessage())


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand anywhere among the options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if unknown := [item for item in rest if item.startswith("-") or "=" not in item or "overrides" not in args]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rlhf", description="Reward models and PPO, stage by stage: prepare, sft, reward, ppo, evaluate.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    whole = commands.add_parser("run", help="every stage of a recipe")
    whole.add_argument("--recipe", default="demo", help="a folder of configs/, or a path to one (default: demo)")
    whole.add_argument("--tiny", action="store_true", help="a small model made from nothing and the demo world's feedback in their place")
    whole.add_argument("--until", default="evaluate", choices=list(config.STAGES), help="stop after this stage")
    for stage, cls in config.STAGES.items():
        single = commands.add_parser(stage, help=f"the {stage} stage alone", description=cls.__doc__)
        single.add_argument("--config", required=True, help=f"its YAML file, such as configs/demo/{stage}.yaml")
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, help="seeds everything")
        command.add_argument("--force", action="store_true", help="run even what is unchanged; drop a partial run")
        command.add_argument("--dry-run", action="store_true", help="check the configs and say what would be written")
    examined = commands.add_parser("doctor", help="a config, its inputs, its data and its memory, before anything loads")
    examined.add_argument("--config", required=True, help="a recipe's folder, such as configs/demo, or one of its files")
    above_0 = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
    examined.add_argument("--device-memory", type=above_0, metavar="GB", help="of the device it is for (default: what is here)")
    for command in commands.choices.values():
        command.add_argument("--run", help="name of the run (default: the recipe's)")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    shown = commands.add_parser("show", help="the state of a run, what an artifact is, or what differs between two")
    shown.add_argument("folder", help="a run, such as runs/demo, or a stage's folder in it")
    shown.add_argument("other", nargs="?", help="another of the same, to compare")
    shown.add_argument("--verify", action="store_true", help="read every file again, whatever its size and time say")
    _add_scoring(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_scoring(commands: Any) -> None:
    """The commands that use what the stages made; they take no overrides."""
    scored = commands.add_parser("score", help="a file's answers, each with its reward")
    best = commands.add_parser("best-of-n", help="to each prompt of a file the best of n sampled answers")
    compared = commands.add_parser("compare", help="answers to one prompt, best first")
    for command in (scored, best, compared):
        command.add_argument("--reward", required=True, help="a reward artifact, a classifier's folder, a hub id, or the URL of a server")
        command.add_argument("--reads", metavar="NAME", help="the folder or hub id of what a server serves, where it does not tell")
        command.add_argument("--positive-label", metavar="NAME", help="of a classifier with several labels the good one")
    best.add_argument("--policy", required=True, help="a policy artifact, a model's folder or a hub id")
    for command in (scored, best):
        command.add_argument("--input", required=True, metavar="FILE", help="CSV, TSV, JSON, JSONL or Parquet")
        command.add_argument("--output", required=True, metavar="FILE", help="the same rows with new columns: .csv, .jsonl or .parquet")
        command.add_argument("--force", action="store_true", help="replace an output that exists")
    count = _number(int, lambda value: value > 0, "a whole number above 0")
    scored.add_argument("--batch-size", type=count, default=64, help="answers scored together (default: 64)")
    scored.add_argument("--alpha", type=_number(float, math.isfinite, "a number"), help="scales the rewards (default: the artifact's own)")
    scored.add_argument("--normalize", action="store_true", help="centre and scale on the artifact's reference sample first")
    best.add_argument("--n", type=count, default=16, help="answers to each prompt (default: 16)")
    warm = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
    best.add_argument("--temperature", type=warm, default=0.7, help="(default: 0.7)")
    best.add_argument("--response-tokens", type=count, default=48, help="of an answer at most (default: 48)")
    best.add_argument("--max-prompt-tokens", type=count, default=256, help="the last so many are read (default: 256)")
    best.add_argument("--seed", type=int, default=0, help="seeds the answers, each by its row (default: 0)")
    best.add_argument("--batch-size", type=count, default=32, help="answers sampled together (default: 32)")
    compared.add_argument("prompt", help="what was asked")
    compared.add_argument("answers", nargs="+", metavar="answer", help="two or more; after -- they may begin with a dash")


def _number(kind: Callable[[str], Any], is_right: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """A type for argparse that says what was expected."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if is_right(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")

    return parse
