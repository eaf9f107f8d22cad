"""The small world that the faults happen in: a run of five tiny stages, and files for the tools."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.processes import AtChange, run_cli, scratch_copy

RUN = "runs/world"
TRAINED = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "save_steps": 2, "max_steps": 6}
SCRATCH = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 300, "positions": 96}
CONFIGS: dict[str, dict[str, Any]] = {
    "prepare": {"source": {"format": "comparisons", "path": "pairs.jsonl"}},
    "sft": {"model": "scratch", "scratch": SCRATCH, "max_length": 96, "training": TRAINED},
    "reward": {"model": f"{RUN}/sft", "max_length": 96, "training": TRAINED},
    "ppo": {
        "evaluation": {"keep": True},
        "max_prompt_tokens": 64,
        "training": {
            "num_rollouts": 3,
            "num_ppo_epochs": 1,
            "num_mini_batches": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "response_tokens": 6,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
        },
    },
    "evaluate": {"prompts": 4, "best_of": 4, "response_tokens": 6},
}
STAGES = tuple(CONFIGS)
TRAINED_STAGES = ("sft", "reward", "ppo")
INPUTS: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "sft": ("prepare",),
    "reward": ("prepare", "sft"),
    "ppo": ("prepare", "sft", "reward"),
    "evaluate": ("prepare", "sft", "reward", "ppo"),
    "score": ("sft", "reward"),
    "best-of-n": ("sft", "reward"),
}
FILES = ("configs", "pairs.jsonl", "answers.jsonl", "prompts.jsonl")
COMMANDS: dict[str, list[str]] = {
    stage: [stage, "--config", f"configs/{stage}.yaml", "--run", "world"] for stage in STAGES
} | {
    "score": (
        f"score --reward {RUN}/reward --input answers.jsonl --output scored.jsonl --batch-size 8"
    ).split(),
    "best-of-n": (
        f"best-of-n --reward {RUN}/reward --policy {RUN}/sft --input prompts.jsonl --output best.csv "
        "--n 64 --response-tokens 6 --batch-size 64"
    ).split(),
}
OUTPUTS = {stage: f"{RUN}/{stage}" for stage in STAGES} | {"score": "scored.jsonl", "best-of-n": "best.csv"}


@dataclass
class Reference:
    """An undisturbed command: what it made, how long it took, and how often it changed the file system."""

    identity: str
    seconds: float
    changes: int


@dataclass
class World:
    """The published run in `folder`; beside it a partial folder of each stage that trains, and references."""

    folder: Path

    @property
    def partials(self) -> Path:
        return self.folder.with_name("partials")

    def needs(self, command: str) -> list[str]:
        """Return what a command starts from, as paths in `folder`."""
        return [*FILES, *(f"{RUN}/{stage}" for stage in INPUTS[command])]

    def reference(self, command: str, processes: int = 1) -> Reference:
        """Return the undisturbed command in so many processes; run it if no lane has run it yet."""
        file = self.folder.with_name(f"reference-{command}-{processes}.json")
        if not file.exists():
            scratch = self.folder.with_name(f"reference-{command}-{processes}-{os.getpid()}")
            with scratch_copy(scratch, self.folder, self.needs(command)):
                self.keep(command, processes, _run(command, scratch, processes))
        return Reference(**json.loads(file.read_text()))

    def keep(self, command: str, processes: int, reference: Reference) -> None:
        """Keep a reference for all lanes."""
        file = self.folder.with_name(f"reference-{command}-{processes}.json")
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(vars(reference)))
        temporary.replace(file)


def build_world(folder: Path) -> World:
    """Make the world below `folder`. Raises `RuntimeError` if a command fails undisturbed."""
    world = World(folder / "world")
    write_inputs(world.folder)
    for command in COMMANDS:
        world.keep(command, 1, _run(command, world.folder))
    for stage in TRAINED_STAGES:
        _interrupt(world, stage)
    return world


def _run(command: str, folder: Path, processes: int = 1) -> Reference:
    result = run_cli(COMMANDS[command], folder, processes=processes)
    if result.code != 0:
        raise RuntimeError(f"rlhf {' '.join(COMMANDS[command])} fails undisturbed: {result.err}")
    return Reference(identity_of(folder / OUTPUTS[command]), result.seconds, result.changes)


def _interrupt(world: World, stage: str) -> None:
    """Kill a stage as it begins its last checkpoint: two whole ones are left, of steps 2 and 4."""

    def act(path: Path) -> None:
        if "checkpoint-6" in path.parts:
            os.kill(os.getpid(), signal.SIGKILL)

    with scratch_copy(
        world.folder.with_name(f"interrupted-{stage}"), world.folder, world.needs(stage)
    ) as folder:
        run_cli(COMMANDS[stage], folder, disturbance=AtChange(1, act, lasting=True))
        partial = folder / RUN / f".{stage}.partial"
        found = sorted(path.name for path in partial.glob("work/checkpoint-*"))
        if found[:2] != ["checkpoint-2", "checkpoint-4"]:
            raise RuntimeError(f"{stage}: left {found}, expected checkpoint-2 and checkpoint-4")
        world.partials.mkdir(exist_ok=True)
        partial.rename(world.partials / partial.name)


def write_inputs(folder: Path) -> None:
    """Write the configs, and the files of pairs, answers and prompts."""
    (folder / "configs").mkdir(parents=True)
    for stage, config in CONFIGS.items():
        (folder / f"configs/{stage}.yaml").write_text(yaml.safe_dump(config))
    questions = [f"What is {a} plus {b}?" for a in range(8) for b in range(6)]
    pairs = [
        {"prompt": question, "chosen": f"It is {number}.", "rejected": f"No idea {number}."}
        for number, question in enumerate(questions)
    ]
    write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "prompts.jsonl", [{"prompt": question} for question in questions[:12]])
    answers = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs for _ in range(12)]
    write_lines(folder / "answers.jsonl", answers)


def write_lines(file: Path, rows: Sequence[Any]) -> None:
    """Write a JSON value a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files_in(folder: Path) -> set[str]:
    """Return every file and folder below `folder`, hidden ones too, by relative path."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {path for path in paths if "__pycache__" not in path}


def identity_of(output: Path) -> str:
    """Return the identity of an artifact by its manifest, or the bytes of a file in hexadecimal."""
    if output.is_dir():
        return str(json.loads((output / "manifest.json").read_text())["identity"])
    return output.read_bytes().hex() if output.exists() else "not there"


def expect_same(outcome: Any, output: Path, identity: str) -> None:
    """Expect the output to be what the undisturbed command made."""
    outcome.expect(identity_of(output) == identity, f"another {output.name} than without the fault")


def weights_problem(output: Path) -> str | None:
    """Return what is wrong with the weights that were published, if any were; None if all are finite."""
    import numpy
    from safetensors.numpy import load_file

    for file in sorted(output.rglob("*.safetensors")):
        for name, values in load_file(file).items():
            if not numpy.isfinite(values).all():
                return f"weights that are not finite: {name}"
    return None


def contents_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below `folder`, by relative path."""
    paths = {name: folder / name for name in files_in(folder)}
    return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
