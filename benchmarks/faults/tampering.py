"""Change, cut, remove and add files of artifacts: whoever opens them refuses; and of checkpoints: a resumed
stage ends as if nothing had happened.
"""

import os
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from benchmarks.faults.cases import Case, Outcome, Section
from benchmarks.faults.mutations import Random, change_bytes
from benchmarks.faults.processes import Result, run_child, run_cli, scratch_copy
from benchmarks.faults.world import (
    COMMANDS,
    OUTPUTS,
    RUN,
    STAGES,
    TRAINED_STAGES,
    World,
    expect_same,
    files_in,
)

KINDS = {"prepare": "records", "sft": "policy", "reward": "reward", "ppo": "policy", "evaluate": "evaluation"}
TOLD = ("was altered", "half-written", "is missing", "making it again")
NEXT = {"prepare": "sft", "sft": "reward", "reward": "ppo", "ppo": "evaluate"}  # the stage that opens it
CHANGES = ("flip", "flip, time kept", "cut", "removed")
ADDED = {
    "adapter_config.json": '{"peft_type": "LORA", "r": 1, "base_model_name_or_path": "."}',
    "model.safetensors.index.json": '{"metadata": {}, "weight_map": {}}',
    "pytorch_model.bin": "no weights",
    "generation_config.json.bak": "{}",
    "added_tokens.json": '{"<extra>": 299}',
    "special_tokens_map.json": '{"eos_token": "a"}',
    "modeling_own.py": "raise SystemExit('ran')",
    "notes/read me.txt": "notes",
    ".notes": "hidden files are the user's",
}


def plan(world: World) -> list[tuple[str, str, str]]:
    """Every change of every file of every artifact and of the newest checkpoint, and files added to each."""
    tries: list[tuple[str, str, str]] = []
    for stage in STAGES:
        folder = world.folder / OUTPUTS[stage]
        files = [name for name in files_in(folder) if (folder / name).is_file()]
        tries += product([stage], sorted(files), CHANGES)
        tries += product([stage], ADDED, ["added"])
    for stage in TRAINED_STAGES:
        checkpoint = world.partials / f".{stage}.partial/work/checkpoint-4"
        names = sorted(path.name for path in checkpoint.iterdir())
        tries += product([f"checkpoint of {stage}"], names, ["flip", "cut", "removed"])
    return tries


def run(case: Case) -> Outcome:
    """Change one file; the artifact is refused, or the stage resumes to the same result."""
    stage = case.what[0].removeprefix("checkpoint of ")
    return _resume(case, stage) if case.what[0] != stage else _open(case)


def _open(case: Case) -> Outcome:
    stage, name, change = case.what
    follower = NEXT.get(stage)
    argv = COMMANDS[follower] if follower else ["show", OUTPUTS[stage]]
    outcome = Outcome(f"{stage}/{name}: {change}; then rlhf {' '.join(argv)}")
    names = case.world.needs(follower) if follower else [OUTPUTS[stage]]
    with scratch_copy(case.folder, case.world.folder, names) as folder:
        readers = {
            "require": lambda: run_child(lambda: _require(stage), folder),
            "show --verify": lambda: run_cli(["show", OUTPUTS[stage], "--verify"], folder),
            argv[0]: lambda: run_cli(argv, folder),
        }
        readers["require"]()  # what remembers hashes knows the files as they were
        change_file(folder / OUTPUTS[stage] / name, change, case.random)
        results = {reader: outcome.saw(open_()) for reader, open_ in readers.items()}
        if Path(name).name.startswith("."):
            accepted = all(result.code == 0 for result in results.values())
            outcome.expect(accepted, f"a hidden file is not let alone: {_summaries(results)}")
            return outcome
    what = {"added": "added", "removed": "removed", "cut": "cut"}.get(change, "changed")
    for reader, result in results.items():
        told = result.is_refusal or is_told(result)
        if not result.tracebacks:
            outcome.expect(told, f"{reader} does not see a {what} file: {result.summary}")
    outcome.figures[f"{what} refused"] += not outcome.problems
    outcome.figures[what] += 1
    return outcome


def is_told(result: Result) -> bool:
    """Return whether the command says on its standard output that something is wrong with the artifact."""
    return any(words in result.out for words in TOLD)


def _require(stage: str) -> int:
    """Open the artifact as a stage does it, from Python."""
    from pipeline.artifacts.inputs import require_artifact
    from pipeline.errors import UserError

    try:
        require_artifact(OUTPUTS[stage], KINDS[stage], "make it again")
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        return 2
    return 0


def _summaries(results: dict[str, Result]) -> str:
    return ", ".join(f"{reader}: {result.summary}" for reader, result in results.items() if result.code != 0)


def _resume(case: Case, stage: str) -> Outcome:
    _, name, change = case.what
    outcome = Outcome(
        f".{stage}.partial/work/checkpoint-4/{name}: {change}; then {' '.join(COMMANDS[stage])}"
    )
    with scratch_copy(case.folder, case.world.folder, case.world.needs(stage)) as folder:
        partial = folder / RUN / f".{stage}.partial"
        shutil.copytree(case.world.partials / partial.name, partial)
        change_file(partial / "work/checkpoint-4" / name, change, case.random)
        result = outcome.saw(run_cli(COMMANDS[stage], folder))
        if not result.tracebacks:
            outcome.expect(result.code == 0, f"a broken checkpoint ends the stage: {result.summary}")
        if result.code == 0:
            expect_same(outcome, folder / OUTPUTS[stage], case.world.reference(stage).identity)
    outcome.figures["resumed"] += not outcome.problems
    outcome.figures["checkpoints"] += 1
    return outcome


def change_file(file: Path, change: str, rng: Random) -> None:
    """Change one file; a time that is kept is that of the last modification."""
    if change == "added":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(ADDED[_relative(file)])
        return
    if change == "removed":
        file.unlink()
        return
    stat = file.stat()
    file.write_bytes(change_bytes(file.read_bytes(), rng, change.partition(",")[0])[0])
    if change.endswith("time kept"):
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _relative(file: Path) -> str:
    return next(name for name in ADDED if file.as_posix().endswith(name))


def _figures() -> str:
    kinds: Sequence[str] = ("changed", "cut", "removed", "added")
    refused = ", ".join(f"{kind} {{{kind}}}, refused {{{kind} refused}}" for kind in kinds)
    return f"files {refused}; broken checkpoints {{checkpoints}}, same result {{resumed}}"


SECTION = Section("bytes", plan, run, _figures(), full=300, short=40)
