"""A case tries one fault; an outcome says whether the promises held. The figures of outcomes add up."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks.faults.processes import Result
from benchmarks.faults.world import World


@dataclass
class Outcome:
    """What a case found. `command` reproduces it by hand; `figures` are counts."""

    command: str = ""
    problems: list[str] = field(default_factory=list)
    figures: Counter[str] = field(default_factory=Counter)
    tracebacks: int = 0

    def expect(self, holds: bool, problem: str) -> bool:
        """Record a promise that does not hold."""
        if not holds:
            self.problems.append(problem)
        return holds

    def saw(self, result: Result) -> Result:
        """Record the tracebacks of a command; each breaks a promise."""
        self.tracebacks += result.tracebacks
        self.expect(not result.tracebacks, f"traceback: {result.summary}")
        return result

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, line: str) -> "Outcome":
        values = json.loads(line)
        return cls(**values | {"figures": Counter(values["figures"])})


class Case(NamedTuple):
    """What is tried, in a folder of its own that does not exist yet, with its own random numbers."""

    world: World
    folder: Path
    what: Any
    random: Random


class Section(NamedTuple):
    """A kind of faults: all that can be tried, how a case tries it, and the line of figures."""

    name: str
    plan: Callable[[World], Sequence[Any]]
    run: Callable[[Case], Outcome]
    figures: str  # with {names} of the outcomes' figures
    full: int  # cases
    short: int


def choose(section: Section, world: World, seed: int, count: int) -> list[Any]:
    """Return what the first `count` cases try: the whole plan in an order by the seed, again and again."""
    plan = list(section.plan(world))
    Random(f"{seed} {section.name}").shuffle(plan)
    return [plan[index % len(plan)] for index in range(count)]


def random_of(section: Section, seed: int, index: int) -> Random:
    """Return the random numbers of a case, which do not depend on other cases."""
    return Random(f"{seed} {section.name} {index}")


def kind_of_problem(problem: str) -> str:
    """Return the problem without the numbers, quoted texts and paths in which equal ones differ."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[^\s:=(]*/[^\s:;,)]+|\d[\d.,e+-]*", "…", problem)[:160]
