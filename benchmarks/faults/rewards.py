"""Reward functions that fail, lie, or change what they are given, in PPO."""

import shutil
from pathlib import Path

from benchmarks.faults.cases import Case, Outcome, Section
from benchmarks.faults.processes import run_cli, scratch_copy
from benchmarks.faults.world import COMMANDS, OUTPUTS, World, contents_of, identity_of, weights_problem

MODULE = "own_reward"
SIGNATURE = "def reward(prompts, completions, completion_ids, ended, **columns):"
RIGHT = "[len(text) / 10 for text in completions]"
# The body of the function; `right` are the rewards it should give.
REFUSED = {
    "NaN": "return [float('nan')] * len(prompts)",
    "one NaN": "right[-1] = float('nan'); return right",
    "infinity": "return [float('inf')] * len(prompts)",
    "too large": "return [1e300] * len(prompts)",
    "too large for a float": "return [10 ** 400] * len(prompts)",
    "raises": "raise ValueError('no')",
    "raises in two lines": "raise RuntimeError('no\\nreally')",
    "KeyError": "return columns['topic']",
    "TypeError": "return len(5)",
    "AssertionError": "assert False",
    "StopIteration": "return next(iter(()))",
    "RecursionError": "return reward(prompts, completions, completion_ids, ended)",
    "sys.exit": "raise SystemExit('no')",
    "sys.exit(0)": "raise SystemExit(0)",
    "raises later": "calls.append(1); assert len(calls) < 4, 'no'; return right",
    "too few": "return right[1:]",
    "too many": "return right + [0.0]",
    "none": "return []",
    "None": "return None",
    "number": "return 1.0",
    "text": "return '1' * len(prompts)",
    "texts": "return ['1'] * len(prompts)",
    "dict": "return dict(enumerate(right))",
    "dict by number": "return {number: 1.0 for number in range(len(prompts))}",
    "complex": "return [1j] * len(prompts)",
    "matrix": "import numpy; return numpy.ones((len(prompts), 2))",
    "scalar array": "import numpy; return numpy.float64(1)",
    "set": "return set(map(float, range(len(prompts))))",
    "empty rows": "return [[] for _ in prompts]",
    "dates": "import datetime; return [datetime.date.today()] * len(prompts)",
}
ACCEPTED = {
    "numpy array": "import numpy; return numpy.array(right)",
    "tensor": "import torch; return torch.tensor(right, dtype=torch.float64)",
    "tuple": "return tuple(right)",
    "numpy numbers": "import numpy; return list(map(numpy.float64, right))",
    "clears prompts": "prompts.clear(); return right",
    "reverses completions": "completions.reverse(); return right",
    "clears ids": "[ids.clear() for ids in completion_ids]; return right",
    "changes ids": "completion_ids[0][:] = [1] * len(completion_ids[0]); return right",
    "ends all": "ended[:] = [not end for end in ended]; return right",
    "changes columns": "list(map(list.clear, columns.values())); return right",
    "seeds": "import random, torch; random.seed(1); torch.manual_seed(1); return right",
    "prints": "print('reward'); return right",
}


def plan(world: World) -> list[str]:
    """Every function."""
    return [*REFUSED, *ACCEPTED]


def run(case: Case) -> Outcome:
    """Train PPO on a function, over a published PPO that stays if the function fails."""
    name = case.what
    argv = [*COMMANDS["ppo"], f"reward={MODULE}:reward", "--force"]
    outcome = Outcome(f"rlhf {' '.join(argv)} ({name}: {(REFUSED | ACCEPTED)[name]!r})")
    names = [*case.world.needs("ppo"), OUTPUTS["ppo"]]
    with scratch_copy(case.folder, case.world.folder, names) as folder:
        published = folder / OUTPUTS["ppo"]
        before = contents_of(published)
        _write(folder, (REFUSED | ACCEPTED)[name])
        result = outcome.saw(run_cli(argv, folder))
        if name in REFUSED:
            if not result.tracebacks:
                outcome.expect(result.is_refusal, f"not refused: {result.summary}")
            if result.errors:
                outcome.expect(MODULE in result.errors[0], f"the function is not named: {result.errors[0]}")
            outcome.expect(contents_of(published) == before, "the published artifact has changed")
        elif outcome.expect(result.code == 0, f"refused: {result.summary}"):
            outcome.expect(not weights_problem(published), f"publishes {weights_problem(published)}")
            identity = identity_of(published)
            shutil.rmtree(published)
            _write(folder, "return right")
            run_cli(argv, folder)
            outcome.expect(
                identity_of(published) == identity,
                "what the function does to its arguments changes what is trained",
            )
    outcome.figures["refused" if name in REFUSED else "accepted"] += not outcome.problems
    outcome.figures["functions"] += 1
    return outcome


def _write(folder: Path, body: str) -> None:
    """Write the module of the user's function."""
    lines = ["calls = []", SIGNATURE, f"    right = {RIGHT}", f"    {body}"]
    (folder / f"{MODULE}.py").write_text("\n".join(lines) + "\n")


SECTION = Section(
    "rewards",
    plan,
    run,
    "{functions} functions: {refused} refused in one line, {accepted} with the result of right rewards",
    full=len(REFUSED) + len(ACCEPTED),
    short=8,
)
