"""The command line: argv in, an exit code out. torch is imported only once the arguments and configs are known to be right.

Exit codes: 0 done; 1 the machine failed (disk full, a file that cannot be read); 2 a mistake in what was given; 130 interrupted.
"""

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import shtab

from pipeline import config
from pipeline.arguments import parse, parser
from pipeline.distributed.processes import destroy_process_group, init_process_group, is_initialized, is_main_process
from pipeline.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        own = {"run": run, "doctor": doctor, "show": show, "score": score, "best-of-n": best_of_n, "compare": compare}
        own |= {"push": push, "completion": completion}
        own.get(args.command, run_stage)(args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # who reads, as `head` does, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        known = isinstance(error, UserError | KeyboardInterrupt | OSError) or _disk_is_full(error)
        if args.debug or not known:
            raise
        message, code = _explain(error)
        if is_main_process() or is_initialized():  # before they join all ranks come upon the same
            print(f"{'error: ' if code != 130 else ''}{message}", file=sys.stderr)
        return code


def entry() -> None:
    """The console script."""
    code = main()
    if code == 0:  # after a failure the others may no longer be there to leave with
        destroy_process_group()
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
    init_process_group()
    for loaded in configs:
        import_module(f"pipeline.{loaded.stage}.stage").check(loaded)
    for loaded in configs:
        if args.dry_run:
            _would(loaded)
        else:
            _run(loaded)
    if args.until == "evaluate" and not args.dry_run and is_main_process():
        print(import_module("pipeline.evaluate.summary").summary_table(configs[-1].folder))


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
    init_process_group()
    import_module(f"pipeline.{loaded.stage}.stage").check(loaded)
    if args.dry_run:
        _would(loaded)
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
    from pipeline.distributed.launch import unsupported_sharding
    from pipeline.tools.doctor.accelerate_configs import launch_environment, num_shards
    from pipeline.tools.doctor.examine import examine

    parts, wrong = num_shards(args.launch) if args.launch else 1, 0
    launched = launch_environment(args.launch) if args.launch else {}
    for stage in wanted:
        found, errors = examine(recipe[stage], recipe, args.device_memory and 1e9 * args.device_memory, parts)
        if problem := unsupported_sharding(launched, getattr(recipe[stage], "algorithm", "ppo")):
            found, errors = [*found, ("launch", f"error: {problem}")], errors + 1
        wrong += errors
        print("\n".join([f"{stage}: {recipe[stage].folder}", *(f"  {what:<10} {text}" for what, text in found)]), flush=True)
    if wrong:
        raise UserError(f"doctor: {wrong} thing{'s are' if wrong > 1 else ' is'} wrong: see the lines that begin with 'error:'")


def show(args: argparse.Namespace) -> None:
    """The state of a run, what an artifact is and was made from, or what differs between two."""
    from pipeline.tools.show.show import show_folders

    print(show_folders([Path(folder) for folder in (args.folder, args.other) if folder], args.verify))


def push(args: argparse.Namespace) -> None:
    """A model and its card, to the hub."""
    from pipeline.tools.push.push import push_artifact

    print(push_artifact(Path(args.folder), args.to, private=args.private, revision=args.revision))


def completion(args: argparse.Namespace) -> None:
    """A script for a shell to read."""
    print(shtab.complete(parser(), args.shell))


def score(args: argparse.Namespace) -> None:
    """A file's answers, each with its reward."""
    from pipeline.tools.score import read_job, score_file

    reward = _reward(args)
    work = read_job(args.command, Path(args.input), Path(args.output), args.force)
    _quiet_libraries()
    init_process_group()
    score_file(work, reward, **_given(args, "batch_size", "alpha", "normalize"))


def best_of_n(args: argparse.Namespace) -> None:
    """To each prompt of a file the best of n sampled answers."""
    from pipeline.tools.score import best_of_n_file, read_job

    reward = _reward(args)
    work = read_job(args.command, Path(args.input), Path(args.output), args.force)
    _quiet_libraries()
    init_process_group()
    drawn = _given(args, "n", "temperature", "response_tokens", "max_prompt_tokens", "seed", "batch_size")
    best_of_n_file(work, reward, args.policy, **drawn)


def compare(args: argparse.Namespace) -> None:
    """Answers to one prompt, best first."""
    from pipeline.tools.score import compare_responses

    reward = _reward(args)
    _quiet_libraries()
    print(compare_responses(reward, args.prompt, args.answers))


def _reward(args: argparse.Namespace) -> config.Reward:
    given = {"source": args.reward, "positive_label": args.positive_label, "reads": args.reads}
    return config.validate(config.Reward, given, f"--reward {args.reward}")


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _would(loaded: config.StageConfig) -> None:
    if is_main_process():
        print(f"{loaded.stage}: would write {loaded.folder}")


def _run(loaded: config.StageConfig) -> None:
    if is_main_process():
        print(f"{loaded.stage}: {loaded.folder}", flush=True)
    import_module(f"pipeline.{loaded.stage}.stage").run(loaded)


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
