"""Kill a command at random moments, and give it again until it ends: its result is as if nothing happened."""

import os
import signal
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.faults.cases import Case, Outcome, Section
from benchmarks.faults.processes import AtChange, Result, Signal, run_cli, scratch_copy
from benchmarks.faults.world import COMMANDS, OUTPUTS, World, expect_same, files_in

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LAST_CHANGES = 16  # those of a publication, drawn more often
TRIES = 3  # of the undisturbed command: two processes may find that their port was taken


def plan(world: World) -> list[tuple[Any, ...]]:
    """Every command in one and two processes, each signal at both kinds of moments, also with --force."""
    one = product(COMMANDS, [1], SIGNALS, ["time", "change"], ["", "--force"])
    two = product([name for name in COMMANDS if name != "prepare"], [2], SIGNALS, ["time", "change"], [""])
    return [*one, *two]


def run(case: Case) -> Outcome:
    """Kill the command once or twice, and compare what it ends with to the undisturbed result."""
    command, processes, number, moment, force = case.what
    argv = [*COMMANDS[command], *filter(None, [force])]
    outcome = Outcome(f"rlhf {' '.join(argv)} ({processes} processes, {number.name} by {moment})")
    names = [*case.world.needs(command), *([OUTPUTS[command]] if force else [])]
    reference = case.world.reference(command, processes)
    with scratch_copy(case.folder, case.world.folder, names) as folder:
        for _ in range(case.random.choice([1, 1, 2])):
            disturbance = _draw(case, reference)
            result = outcome.saw(run_cli(argv, folder, processes=processes, disturbance=disturbance))
            outcome.figures["kills"] += result.code != 0
            if number == signal.SIGINT and processes == 1:
                outcome.expect(result.code in (0, 130), f"interrupted: {result.summary}")
        result = _repeat(argv, folder, processes, outcome)
        if outcome.expect(result.code == 0, f"the same command again: {result.summary}"):
            expect_same(outcome, folder / OUTPUTS[command], reference.identity)
        left = files_in(folder) - files_in(case.world.folder)
        outcome.expect(not left, f"left for good: {', '.join(sorted(left)[:4])}")
    outcome.figures["runs"] += 1
    outcome.figures["identical"] += not outcome.problems
    return outcome


def _repeat(argv: list[str], folder: Path, processes: int, outcome: Outcome) -> Result:
    for _ in range(TRIES if processes > 1 else 1):
        result = outcome.saw(run_cli(argv, folder, processes=processes))
        if result.code == 0:
            break
    return result


def _draw(case: Case, reference: Any) -> Signal | AtChange:
    """Return a moment in the time, or among the changes, of the undisturbed command."""
    _, _, number, moment, force = case.what
    if moment == "time":
        seconds = case.random.uniform(0, reference.seconds)
        return Signal(number, seconds, to_all=number != signal.SIGKILL)
    last = reference.changes + (LAST_CHANGES if force else 0)  # the artifact of before is removed as well
    first = case.random.choice([1, max(1, last - LAST_CHANGES)])
    return AtChange(case.random.randint(first, last), lambda _: os.kill(os.getpid(), number))


SECTION = Section(
    "kills", plan, run, "{kills} kills, results identical in {identical} of {runs} runs", full=90, short=12
)
