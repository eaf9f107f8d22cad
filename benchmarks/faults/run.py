"""Try faults on every part of the pipeline, and print what held: `make faults`, minutes on two cores.

    python -m benchmarks.faults.run [--short] [--seed 0] [--only kills rows …] [--case kills:17]

Each case starts from copies of one small run, in a folder of its own. A case depends on the seed, its section
and its number alone, so `--case` tries it again. The exit code is 1 if a promise was broken.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

# Before anything is imported: children are forked from here, and results must not depend on the machine.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from benchmarks.faults import kills, machine, manifests, rewards, rows, settings, tampering
from benchmarks.faults.cases import Case, Outcome, Section, choose, kind_of_problem, random_of
from benchmarks.faults.world import World, build_world

SECTIONS = {
    module.SECTION.name: module.SECTION
    for module in (kills, rows, tampering, manifests, settings, machine, rewards)
}
Try = tuple[Section, int, object]  # section, number of the case, what it tries


def main() -> int:
    """Run the cases, print the table and what was broken, and return the exit code."""
    args = parse_arguments()
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        import_everything()
        world = build_world(root)
        tries = choose_tries(args, world)
        outcomes = run_lanes(world, tries, args.seed, args.lanes)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(format_table(outcomes))
    print(
        f"{sum(map(len, outcomes.values())):,} cases in {time.monotonic() - started:.0f} s, seed {args.seed}"
    )
    broken = format_broken(outcomes, args.seed)
    print(broken, end="")
    return int(bool(broken))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="try a part, in under two minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--case", metavar="SECTION:NUMBER", help="try one case again")
    parser.add_argument("--count", type=int, help="number of cases of each section")
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="cases at a time")
    return parser.parse_args()


def import_everything() -> None:
    """Import all modules of the package, which the children then need not import, nor collect."""
    import pipeline

    for module in walk_packages(pipeline.__path__, "pipeline."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    gc.freeze()


def choose_tries(args: argparse.Namespace, world: World) -> list[Try]:
    """Return the cases that the arguments ask for."""
    if args.case:
        name, _, number = args.case.partition(":")
        section, index = SECTIONS[name], int(number)
        return [(section, index, choose(section, world, args.seed, index + 1)[index])]
    tries: list[Try] = []
    for name in args.only:
        section = SECTIONS[name]
        count = args.count or (section.short if args.short else section.full)
        tries += [
            (section, index, what) for index, what in enumerate(choose(section, world, args.seed, count))
        ]
    return tries


def run_lanes(world: World, tries: list[Try], seed: int, lanes: int) -> dict[str, dict[int, Outcome]]:
    """Run the cases, a process for each lane, and return the outcomes by section and number."""
    reports = [world.folder.with_name(f"lane-{lane}.jsonl") for lane in range(lanes)]
    pids = []
    for lane, report in enumerate(reports):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_lane(world, tries[lane::lanes], seed, report)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    ended = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(ended):
        raise RuntimeError("a lane of the harness itself failed")

    outcomes: dict[str, dict[int, Outcome]] = defaultdict(dict)
    for report in reports:
        for line in report.read_text().splitlines():
            name, number, outcome = line.split(" ", 2)
            outcomes[name][int(number)] = Outcome.from_json(outcome)
    return {name: dict(sorted(outcomes[name].items())) for name in SECTIONS if name in outcomes}


def run_lane(world: World, tries: list[Try], seed: int, report: Path) -> None:
    """Run cases one after the other; write a line for each to `report`, and print those that are broken."""
    with report.open("w") as lines:
        for section, index, what in tries:
            folder = world.folder.with_name(f"{section.name}-{index}")
            outcome = section.run(Case(world, folder, what, random_of(section, seed, index)))
            lines.write(f"{section.name} {index} {outcome.to_json()}\n")
            if outcome.problems:
                print(f"{section.name}:{index}: {outcome.problems[0]}", file=sys.stderr, flush=True)


def format_table(outcomes: dict[str, dict[int, Outcome]]) -> str:
    """Return a line for each section: cases, cases in which every promise held, tracebacks, figures."""
    lines = [f"{'section':<12}{'tried':>7}{'held':>7}{'tracebacks':>12}  figures"]
    for name, by_number in outcomes.items():
        cases = by_number.values()
        figures: Counter[str] = sum((outcome.figures for outcome in cases), Counter())
        held = sum(not outcome.problems for outcome in cases)
        tracebacks = sum(outcome.tracebacks for outcome in cases)
        text = SECTIONS[name].figures.format_map(defaultdict(int, figures))
        lines.append(f"{name:<12}{len(cases):>7}{held:>7}{tracebacks:>12}  {text}")
    return "\n".join(lines)


def format_broken(outcomes: dict[str, dict[int, Outcome]], seed: int) -> str:
    """Return each kind of broken promise once, with how often it was met and how to see it again."""
    kinds: dict[tuple[str, str], list[tuple[int, str, str]]] = defaultdict(list)
    for name, by_number in outcomes.items():
        for number, outcome in by_number.items():
            for problem in outcome.problems:
                kinds[name, kind_of_problem(problem)].append((number, problem, outcome.command))
    text = ""
    for (name, _), found in sorted(kinds.items(), key=lambda item: (item[0][0], -len(item[1]))):
        number, problem, command = found[0]
        text += f"\n{name}, {len(found)} times: {problem}\n    {command}\n"
        text += f'    make faults ARGS="--seed {seed} --case {name}:{number}"\n'
    return text


if __name__ == "__main__":
    sys.exit(main())
