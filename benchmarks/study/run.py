"""Was PPO worth it? The demo world, in which the true (gold) reward is known, over several seeds; 100 minutes of two cores.

    python benchmarks/study/run.py [--runs runs/study] [--lanes 2]

Prints tables, and writes them to `study.md` beside this file, all figures to `study.json`, the plots to `study.svg`. Interrupted and
started again it goes on: every step is a command of `rlhf`, whose stages are reused or resumed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from report import report

from pipeline.prepare import demo

SCORER_SEED = 50
SEEDS, FEWER = range(8), range(4)  # FEWER: of those that want more runs for each
# The trap: no KL penalty, and many evaluations to see the turn.
TRAP = ["training.kl_coef=0", "training.num_rollouts=60", "training.eval_steps=8", "training.eval_samples=8", "evaluation.keep=false"]
INPUTS = {  # of a stage: the key of its config, the stage that made it
    "reward": {"records": "prepare"},
    "ppo": {"records": "prepare", "policy": "sft", "reward": "reward"},
    "evaluate": {"records": "prepare", "sft": "sft", "reward": "reward"},
}
Command = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--lanes", type=int, default=2, help="processes at a time, of one thread each (default: 2)")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.lanes) as lanes:
        for phase in (learned, scorer, trapped, tuned_otherwise):
            seeds = {learned: SEEDS, scorer: [SEEDS[-1]]}.get(phase, FEWER)
            list(lanes.map(run_all, [list(phase(args.runs, seed)) for seed in seeds]))
    report(args.runs, SEEDS, FEWER)


# What is run


def learned(runs: Path, seed: int) -> Iterator[Command]:
    """The recipe, with best-of-64."""
    yield ["run", "--recipe", "demo", "--run", f"seed-{seed}", "--seed", str(seed), f"runs={runs}", "evaluate.best_of=64"]


def tuned_otherwise(runs: Path, seed: int) -> Iterator[Command]:
    """The same with TRL's algorithms."""
    for name in ("rloo", "grpo"):
        run = f"seed-{seed}-{name}"
        yield stage("ppo", runs, seed, run, f"configs/{name}/ppo.yaml")
        yield stage("evaluate", runs, seed, run, "configs/demo/evaluate.yaml")


def scorer(runs: Path, seed: int) -> Iterator[Command]:
    """A reward model from other data: another labeller's pairs, and broken answers, which no reward model of the recipe has seen."""
    file = runs / "broken.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in broken_pairs(random.Random(SCORER_SEED))), encoding="utf-8")
    yield ["prepare", "--config", "configs/demo/prepare.yaml", "--run", "scorer", "--seed", str(SCORER_SEED), f"runs={runs}",
           f"source=[{{format: demo}}, {{format: comparisons, path: {file}}}]"]  # fmt: skip
    longer = ["training.max_steps=1200", "training.eval_steps=400", "training.save_steps=400"]
    yield ["reward", "--config", "configs/demo/reward.yaml", "--run", "scorer", "--seed", str(SCORER_SEED), f"runs={runs}",
           f"model={runs}/seed-{seed}/sft", *longer]  # fmt: skip


def broken_pairs(rng: random.Random, each: int = 40) -> Iterator[dict[str, str]]:
    """Answers, and what is left of them once words are dropped, repeated, or replaced by those of an answer to another question."""
    prompts = list(demo.questions())
    for prompt in prompts:
        for _ in range(each):
            whole = demo.answer(rng, prompt)
            words, strange = whole.split(), demo.answer(rng, rng.choice(prompts)).split()
            for _ in range(rng.randint(1, 3)):
                start, place = rng.randrange(len(words)), rng.randrange(len(strange))
                stop = start + rng.randint(1, 3)
                edit = rng.choice(["drop", "repeat", "replace"])
                if edit == "drop" and len(words) > 4:
                    del words[start:stop]
                elif edit == "repeat":
                    words[stop:stop] = words[start:stop] * rng.randint(1, 3)
                else:
                    words[start:stop] = strange[place : place + rng.randint(1, 4)]
            if demo.gold(prompt, " ".join(words)) == -1.0:
                yield {"prompt": prompt, "chosen": whole, "rejected": " ".join(words)}


def trapped(runs: Path, seed: int) -> Iterator[Command]:
    """Without a KL penalty: to the end, another seed's reward model looking on; watched, with patience, by gold and by a reward model from
    other data; with an ensemble of four."""
    blind = f"evaluation.scorer={runs}/seed-{(seed + 1) % len(SEEDS)}/reward"
    yield trap(runs, seed, "trap", blind, "evaluation.patience=1000")
    yield trap(runs, seed, "gold", "evaluation.scorer=pipeline.prepare.demo:gold_reward")
    yield trap(runs, seed, "watched", f"evaluation.scorer={runs}/scorer/reward")
    members = [f"seed-{seed}", *(f"seed-{seed}-member-{number}" for number in (1, 2, 3))]
    for number, member in enumerate(members[1:], 1):
        yield stage("reward", runs, 100 * number + seed, member, "configs/demo/reward.yaml", f"model={runs}/seed-{seed}/sft")
    every = ", ".join(f"{runs}/{member}/reward" for member in members)
    yield trap(runs, seed, "ensemble", blind, "evaluation.patience=1000", f"reward=[{every}]", "uncertainty_penalty=2")


def trap(runs: Path, seed: int, name: str, *overrides: str) -> Command:
    return stage("ppo", runs, seed, f"seed-{seed}-{name}", "configs/demo/ppo.yaml", *TRAP, *overrides)


def stage(name: str, runs: Path, seed: int, run: str, file: str, *overrides: str) -> Command:
    """A stage of a run beside `seed-N`, whose artifacts it reads unless told otherwise."""
    of_seed = runs / "-".join(run.split("-")[:2])
    given = [f"{key}={of_seed}/{folder}" for key, folder in INPUTS[name].items()]
    return [name, "--config", file, "--run", run, "--seed", str(seed), f"runs={runs}", *given, *overrides]


def run_all(commands: Sequence[Command]) -> None:
    for command in commands:
        print("rlhf", *command, flush=True)
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "pipeline", *command], env=one_thread, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: rlhf {' '.join(command)}: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
