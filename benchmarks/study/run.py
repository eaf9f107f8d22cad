"""Does PPO beat best-of-n, and what do rewards inside a response buy? A study of two hours on two cores.

    python benchmarks/study/run.py [--runs runs/study] [--lanes 2] [--only demo|sums]

On the demo world it covers eight seeds with best-of-64, TRL's algorithms, reward hacking without a KL
penalty, and an ensemble. On the world of sums it compares rewards of steps with one of the final answer.
It prints tables and writes them to `study.md` and `sums.md` beside this file, all metrics to `study.json` and
`sums.json`, and the plots to `study.svg` and `sums.svg`. Every step is a command of `rlhf`, so an interrupted
study resumes: complete stages are reused.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sums
from report import write_report
from sums_report import write_sums_report

from pipeline.prepare import demo

SEEDS = range(8)
FEWER_SEEDS = range(4)  # of the phases with several runs for each seed
SCORER_SEED = 50

# Without a KL penalty, and with many evaluations, so that the peak of the gold reward is visible.
NO_PENALTY = [
    "training.kl_coef=0",
    "training.num_rollouts=60",
    "training.eval_steps=8",
    "training.eval_samples=8",
    "evaluation.keep=false",
]
RUN_TO_THE_END = "evaluation.patience=1000"

# Stage -> the config key of each input, and the stage that makes it.
INPUTS = {
    "reward": {"records": "prepare"},
    "ppo": {"records": "prepare", "policy": "sft", "reward": "reward"},
    "evaluate": {"records": "prepare", "sft": "sft", "reward": "reward"},
}

Command = list[str]


def main() -> None:
    """Run all phases in order, then write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the study's runs")
    parser.add_argument(
        "--lanes", type=int, default=2, help="processes at a time, of one thread each (default: 2)"
    )
    parser.add_argument("--only", choices=("demo", "sums"), help="run the part on this world alone")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)

    phases = {
        "demo": (
            (demo_commands, SEEDS),
            (scorer_commands, SEEDS[-1:]),
            (no_penalty_commands, FEWER_SEEDS),
            (algorithm_commands, FEWER_SEEDS),
        ),
        "sums": ((sums.commands, sums.SEEDS),),
    }
    worlds = [args.only] if args.only else list(phases)
    with ThreadPoolExecutor(args.lanes) as lanes:
        for commands, seeds in (phase for world in worlds for phase in phases[world]):
            list(lanes.map(run_all, [list(commands(args.runs, seed)) for seed in seeds]))
    if "demo" in worlds:
        write_report(args.runs, SEEDS, FEWER_SEEDS)
    if "sums" in worlds:
        write_sums_report(args.runs, sums.SEEDS)


# Phases: the commands of each, for one seed


def demo_commands(runs: Path, seed: int) -> Iterator[Command]:
    """Run the recipe `demo`, with best-of-64."""
    options = ["--recipe", "demo", "--run", f"seed-{seed}", "--seed", str(seed)]
    yield ["run", *options, f"runs={runs}", "evaluate.best_of=64"]


def algorithm_commands(runs: Path, seed: int) -> Iterator[Command]:
    """Train and evaluate with TRL's algorithms, on the inputs of PPO."""
    for name in ("rloo", "grpo"):
        run = f"seed-{seed}-{name}"
        yield stage_command("ppo", runs, seed, run, f"configs/{name}/ppo.yaml")
        yield stage_command("evaluate", runs, seed, run, "configs/demo/evaluate.yaml")


def scorer_commands(runs: Path, seed: int) -> Iterator[Command]:
    """Train a held-out scorer: a reward model on data that no reward model of the recipe has seen.

    The data are the pairs of another annotator, and pairs of a response with a broken copy of it.
    """
    file = runs / "broken.jsonl"
    pairs = broken_pairs(random.Random(SCORER_SEED))
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")

    options = ["--run", "scorer", "--seed", str(SCORER_SEED), f"runs={runs}"]
    source = f"source=[{{format: demo}}, {{format: comparisons, path: {file}}}]"
    yield ["prepare", "--config", "configs/demo/prepare.yaml", *options, source]

    steps = ["training.max_steps=1200", "training.eval_steps=400", "training.save_steps=400"]
    model = f"model={runs}/seed-{seed}/sft"
    yield ["reward", "--config", "configs/demo/reward.yaml", *options, model, *steps]


def broken_pairs(rng: random.Random, per_prompt: int = 40) -> Iterator[dict[str, str]]:
    """Yield pairs of a response and a copy with words dropped, repeated or replaced.

    The replacements come from a response to another prompt. A copy that is still valid is left out.
    """
    prompts = list(demo.questions())
    for prompt in prompts:
        for _ in range(per_prompt):
            response = demo.answer(rng, prompt)
            words, other_words = response.split(), demo.answer(rng, rng.choice(prompts)).split()
            for _ in range(rng.randint(1, 3)):
                break_words(rng, words, other_words)
            broken = " ".join(words)
            if demo.gold(prompt, broken) == -1.0:
                yield {"prompt": prompt, "chosen": response, "rejected": broken}


def break_words(rng: random.Random, words: list[str], other_words: Sequence[str]) -> None:
    """Drop, repeat or replace a few of `words` in place."""
    start, other_start = rng.randrange(len(words)), rng.randrange(len(other_words))
    stop = start + rng.randint(1, 3)
    edit = rng.choice(["drop", "repeat", "replace"])
    if edit == "drop" and len(words) > 4:
        del words[start:stop]
    elif edit == "repeat":
        words[stop:stop] = words[start:stop] * rng.randint(1, 3)
    else:
        words[start:stop] = other_words[other_start : other_start + rng.randint(1, 4)]


def no_penalty_commands(runs: Path, seed: int) -> Iterator[Command]:
    """Run PPO without a KL penalty four times.

    `trap` runs to the end; its held-out scorer is the reward model of another seed. `gold` and `watched` stop
    early, by the gold reward and by the scorer of `scorer_commands`. `ensemble` runs to the end with an
    ensemble of four reward models. The names are those of the runs' folders and of sections of `study.json`.
    """
    other_seed = f"evaluation.scorer={runs}/seed-{(seed + 1) % len(SEEDS)}/reward"
    yield no_penalty_command(runs, seed, "trap", other_seed, RUN_TO_THE_END)
    yield no_penalty_command(runs, seed, "gold", "evaluation.scorer=pipeline.prepare.demo:gold_reward")
    yield no_penalty_command(runs, seed, "watched", f"evaluation.scorer={runs}/scorer/reward")

    members = [f"seed-{seed}", *(f"seed-{seed}-member-{number}" for number in (1, 2, 3))]
    for number, member in enumerate(members[1:], 1):
        model = f"model={runs}/seed-{seed}/sft"
        member_seed = 100 * number + seed
        yield stage_command("reward", runs, member_seed, member, "configs/demo/reward.yaml", model)
    rewards = ", ".join(f"{runs}/{member}/reward" for member in members)
    ensemble = [f"reward=[{rewards}]", "uncertainty_penalty=2"]
    yield no_penalty_command(runs, seed, "ensemble", other_seed, RUN_TO_THE_END, *ensemble)


def no_penalty_command(runs: Path, seed: int, name: str, *overrides: str) -> Command:
    """Return the command of one PPO run without a KL penalty."""
    config = "configs/demo/ppo.yaml"
    return stage_command("ppo", runs, seed, f"seed-{seed}-{name}", config, *NO_PENALTY, *overrides)


def stage_command(name: str, runs: Path, seed: int, run: str, config: str, *overrides: str) -> Command:
    """Return the command of a stage in the run `seed-N-…`, with the artifacts of `seed-N` as its inputs."""
    source = runs / "-".join(run.split("-")[:2])
    inputs = [f"{key}={source}/{stage}" for key, stage in INPUTS[name].items()]
    options = ["--config", config, "--run", run, "--seed", str(seed), f"runs={runs}"]
    return [name, *options, *inputs, *overrides]


def run_all(commands: Iterable[Command]) -> None:
    """Run commands of `rlhf` one after the other; exit with the error of the first that fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for command in commands:
        print("rlhf", *command, flush=True)
        process = [sys.executable, "-m", "pipeline", *command]
        done = subprocess.run(process, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: rlhf {' '.join(command)}: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
