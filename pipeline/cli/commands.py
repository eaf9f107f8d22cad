"""The commands: one function for each, of its parsed arguments. Each imports what it needs when it runs."""

import argparse
import gc
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import shtab

from pipeline import config
from pipeline.artifacts.manifest import work_folder
from pipeline.artifacts.replacing import check_settings
from pipeline.artifacts.seals import sealed_steps
from pipeline.cli.overrides import check_overrides, split_overrides
from pipeline.cli.parser import build_parser
from pipeline.cli.quiet import silence_libraries
from pipeline.config.values import check_server_url
from pipeline.distributed.processes import init_process_group, is_main_process
from pipeline.errors import Stopped, UserError, as_line, printable


def run_recipe(args: argparse.Namespace) -> None:
    """Run the stages of a recipe that the last one needs, in order, after each config is checked."""
    stages = list(config.STAGES)[: list(config.STAGES).index(args.until) + 1]
    configs, notes = _load_recipe(args, stages)
    config.check_run(list(configs.values()))
    silence_libraries()
    init_process_group()

    for loaded in configs.values():
        import_module(f"pipeline.{loaded.stage}.stage").check(loaded)
    if not args.dry_run:
        check_settings(list(configs.values()))
    for stage in stages:
        if stage in notes and is_main_process():
            print(f"{stage}: {notes[stage]}", flush=True)
        if stage in configs:
            run_loaded(configs[stage], args.dry_run)


def run_stage(args: argparse.Namespace) -> None:
    """Run one stage from its own config file."""
    check_overrides(args.overrides, args.command)
    loaded = config.load(args.command, args.config, args.overrides, **_common_keys(args))
    silence_libraries()
    init_process_group()
    import_module(f"pipeline.{loaded.stage}.stage").check(loaded)
    run_loaded(loaded, args.dry_run)


def run_prepare(args: argparse.Namespace) -> None:
    """Run the prepare stage, or inspect a file."""
    if not args.inspect:
        run_stage(args)
        return
    from pipeline.prepare.inspection import inspect_file

    values: dict[str, Any] = {"run": "inspect", "source": {"path": args.inspect}}
    config.apply_overrides(values, args.overrides)
    inspect_file(config.validate(config.PrepareStage, values, args.inspect))


def run_loaded(loaded: config.StageConfig, dry_run: bool) -> None:
    """Run the stage of a checked config, or print the folder that it would write.

    After `evaluate` its table is printed. Raises `Stopped` after a signal, with what the same command does.
    """
    if is_main_process():
        print(f"{loaded.stage}: {'would write ' if dry_run else ''}{loaded.folder}", flush=True)
    if dry_run:
        return
    with _explain_stop(lambda: _describe_resume(loaded)):
        _run(loaded)
    if loaded.stage == "evaluate" and is_main_process():
        print(printable(import_module("pipeline.evaluate.summary").summary_table(loaded.folder)))


def init(args: argparse.Namespace) -> None:
    """Write a recipe of one's own, as a copy of another."""
    from pipeline.tools.init import write_recipe

    files = write_recipe(Path(args.name), args.recipe)
    print(f"{args.name}: a copy of {args.recipe}: {', '.join(files)}\nnext: rlhf run --recipe {args.name}")


def show_config(args: argparse.Namespace) -> None:
    """Print the keys of a stage's config, or its JSON Schema."""
    from pipeline.tools.reference.keys import format_text
    from pipeline.tools.reference.schemas import read_schema

    if args.schema:
        print(json.dumps(read_schema(args.stage), indent=2, ensure_ascii=False))
    else:
        print(format_text(args.stage, args.key))


def doctor(args: argparse.Namespace) -> None:
    """Check a recipe's stages, or one of them, before they run."""
    path = Path(args.config)
    folder = path if path.is_dir() else path.parent
    files = {stage: folder / f"{stage}.yaml" for stage in config.STAGES}
    present = [stage for stage, file in files.items() if config.find_stage_file(file).exists()]
    checked = present if path.is_dir() else [path.stem]
    if not checked or checked[0] not in config.STAGES:
        names = ", ".join(f"{stage}.yaml" for stage in config.STAGES)
        raise UserError(f"{path}: expected a recipe's folder, or one of its files: {names}")

    known = [stage for stage in files if stage in checked or stage in present]
    overrides = split_overrides(args.overrides, checked[-1], known)
    recipe = {stage: config.load(stage, files[stage], overrides[stage], run=args.run) for stage in known}
    needed, skipped = config.load_run(known, recipe.__getitem__)
    config.check_run(list(needed.values()))
    silence_libraries()
    errors = _examine(args, recipe, checked, skipped if path.is_dir() else {})
    if errors:
        things = f"{errors} thing{'s are' if errors > 1 else ' is'}"
        raise UserError(f"doctor: {things} wrong: see the lines that begin with 'error:'")


def show(args: argparse.Namespace) -> None:
    """Print the state of a run, an artifact and its inputs, the difference of two, or a table."""
    from pipeline.tools.show.show import show_folders

    print(printable(show_folders(list(map(Path, args.folders)), args.verify, args.table)))


def push(args: argparse.Namespace) -> None:
    """Push a model and its card to the hub."""
    from pipeline.tools.push.push import push_artifact

    print(push_artifact(Path(args.folder), args.to, **_select(args, "private", "public", "revision")))


def completion(args: argparse.Namespace) -> None:
    """Print a completion script for a shell."""
    print(shtab.complete(build_parser(), args.shell))


def score(args: argparse.Namespace) -> None:
    """Score the responses of a file."""
    from pipeline.tools.score.commands import score_file
    from pipeline.tools.score.job import read_job

    reward = _reward(args)
    job = read_job(args.command, Path(args.input), Path(args.output), args.force)
    silence_libraries()
    init_process_group()
    with _explain_stop(lambda: _describe_partial(job)):
        score_file(job, reward, **_select(args, "batch_size", "alpha", "normalize", "overlong"))


def best_of_n(args: argparse.Namespace) -> None:
    """Generate n responses to each prompt of a file, and keep the best."""
    from pipeline.tools.score.commands import best_of_n_file
    from pipeline.tools.score.job import read_job

    reward, options = _reward(args), _sampling_options(args)
    job = read_job(args.command, Path(args.input), Path(args.output), args.force)
    silence_libraries()
    init_process_group()
    with _explain_stop(lambda: _describe_partial(job)):
        best_of_n_file(job, reward, args.policy, **options)


def generate(args: argparse.Namespace) -> None:
    """Generate n responses to each prompt of a file."""
    from pipeline.tools.score.generate import generate_file, name_columns
    from pipeline.tools.score.job import read_job

    options = _sampling_options(args)
    job = read_job(args.command, Path(args.input), Path(args.output), args.force, name_columns(args.n))
    silence_libraries()
    init_process_group()
    with _explain_stop(lambda: _describe_partial(job)):
        generate_file(job, args.policy, **options)


def label(args: argparse.Namespace) -> None:
    """Compare the responses that `generate` wrote."""
    from pipeline.tools.score.job import read_job
    from pipeline.tools.score.label import COLUMNS, label_file

    reward = _reward(args)
    job = read_job(args.command, Path(args.input), Path(args.output), args.force, COLUMNS)
    silence_libraries()
    init_process_group()
    with _explain_stop(lambda: _describe_partial(job)):
        label_file(job, reward, **_select(args, "pairs", "seed"))


def compare(args: argparse.Namespace) -> None:
    """Rank responses to one prompt."""
    from pipeline.tools.score.commands import compare_responses

    reward = _reward(args)
    silence_libraries()
    print(printable(compare_responses(reward, args.prompt, args.answers, args.overlong)))


# Commands but the other stages, which share `run_stage`.
COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": run_recipe,
    "init": init,
    "prepare": run_prepare,
    "config": show_config,
    "doctor": doctor,
    "show": show,
    "push": push,
    "score": score,
    "best-of-n": best_of_n,
    "generate": generate,
    "label": label,
    "compare": compare,
    "completion": completion,
}


def _load_recipe(args: argparse.Namespace, stages: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configs of the stages that the last one needs, and a note on each that it does not need.

    Raises `UserError`.
    """
    folder = config.find_recipe(args.recipe)
    overrides = split_overrides(args.overrides, args.until, stages)
    common = _common_keys(args)
    if args.tiny and args.run is None and not any(item.startswith("run=") for item in args.overrides):
        common["run"] = f"{folder.resolve().name}-tiny"

    def load(stage: str) -> Any:
        file = _find_tiny(folder, stage) if args.tiny else folder / f"{stage}.yaml"
        return config.load(stage, file, overrides.get(stage, []), **common)

    notes = _explain_reward(folder, load) if args.until == "reward" else {}
    configs, skipped = config.load_run(stages, load)
    for item in args.overrides:
        if reason := skipped.get(item.partition(".")[0]):
            raise UserError(f"override {item!r}: the run skips this stage: {reason}")
    for loaded in configs.values():
        loaded._recipe = args.recipe + (" --tiny" if args.tiny else "")
    return configs, notes | {stage: f"skipped, {reason}" for stage, reason in skipped.items()}


def _explain_reward(folder: Path, load: Callable[[str], Any]) -> dict[str, str]:
    """Return a note on a reward model that the recipe's PPO does not read.

    Raises `UserError` if the recipe has no reward model to train.
    """
    try:
        ppo = load("ppo")
    except UserError:  # an error of a later stage is none of this run
        return {}
    if ppo.reads("reward"):
        return {}
    reason = config.explain_unread("reward", [ppo])
    if not config.find_stage_file(folder / "reward.yaml").exists():
        raise UserError(
            f"--until reward: {folder} has no reward.yaml, and {reason}: there is no reward model to train; "
            "end with --until ppo"
        )
    return {"reward": f"trained for --until reward alone: {reason}"}


def _find_tiny(folder: Path, stage: str) -> Path:
    """Return the config of a stage's small version: the recipe's own or, except for `reward`, the demo's."""
    file = folder / "tiny" / f"{stage}.yaml"
    if stage == "reward" and not file.exists():
        raise UserError(
            f"--tiny: {folder} has no tiny/reward.yaml, the small version of its model; run it without --tiny"
        )
    return file if file.exists() else config.RECIPES / "demo" / f"{stage}.yaml"


def _run(loaded: config.StageConfig) -> None:
    """Run a stage, and free its memory for the next one: a trainer is part of cycles of references."""
    import_module(f"pipeline.{loaded.stage}.stage").run(loaded)
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()  # does nothing without a GPU


def _describe_resume(loaded: config.StageConfig) -> str:
    """Return what the same command will do with a stage that was stopped."""
    unchanged = "published artifacts are unchanged"
    command = "the same command without --force" if loaded.force else "the same command"
    if steps := sealed_steps(work_folder(loaded.folder)):
        return f"{unchanged}; saved step {steps[-1]}; {command} resumes {loaded.stage} from step {steps[-1]}"
    return f"{unchanged}; {command} begins {loaded.stage} again"


def _describe_partial(job: Any) -> str:
    """Return what the same command will do with a file whose scoring was stopped."""
    from pipeline.tools.score.chunks import partial_file

    partial = partial_file(job)
    return f"the same command {f'resumes from {partial}' if partial.exists() else 'begins again'}"


@contextmanager
def _explain_stop(describe: Callable[[], str]) -> Iterator[None]:
    """Add to Ctrl-C and SIGTERM in this block what the same command will do."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(getattr(error, "number", signal.SIGINT), describe()) from error


def _examine(
    args: argparse.Namespace, recipe: dict[str, Any], stages: Sequence[str], skipped: dict[str, str]
) -> int:
    """Print the doctor's findings for each stage that is not skipped, and return the number of errors."""
    from pipeline.distributed.launch import unsupported_sharding
    from pipeline.tools.doctor.accelerate_configs import launch_environment, num_shards
    from pipeline.tools.doctor.examine import examine

    parts = num_shards(args.launch) if args.launch else 1
    launched = launch_environment(args.launch) if args.launch else {}
    total = 0
    for stage in stages:
        if stage in skipped:
            print(f"{stage}: skipped, {skipped[stage]}", flush=True)
            continue
        memory = args.device_memory and 1e9 * args.device_memory
        findings, errors = examine(recipe[stage], recipe, memory, parts)
        if problem := unsupported_sharding(launched, getattr(recipe[stage], "algorithm", "ppo")):
            findings, errors = [*findings, ("launch", f"error: {problem}")], errors + 1
        total += errors
        lines = [f"  {what:<10} {as_line(text)}" for what, text in findings]
        print("\n".join([f"{stage}: {recipe[stage].folder}", *lines]), flush=True)
    return total


def _reward(args: argparse.Namespace) -> config.Reward:
    section = {"source": args.reward, "positive_label": args.positive_label, "reads": args.reads}
    return config.validate(config.Reward, section, f"--reward {args.reward}")


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `open_sampler`, and `n`. Raises `UserError` if the server's URL is wrong."""
    names = ("n", "temperature", "response_tokens", "max_prompt_tokens", "overlong", "seed", "batch_size")
    url = args.policy_url and _server_url("--policy-url", args.policy_url)
    return {"policy_url": url, **_select(args, *names)}


def _server_url(option: str, url: str) -> str:
    try:
        return check_server_url(option, url, "POLICY")
    except ValueError as error:
        raise UserError(str(error)) from None


def _select(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _common_keys(args: argparse.Namespace) -> dict[str, Any]:
    return {"run": args.run, "seed": args.seed, "force": args.force or None}
