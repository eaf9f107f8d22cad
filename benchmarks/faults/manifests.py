"""Mutate the JSON files that describe artifacts and partial runs: refused or told in one line."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faults.cases import Case, Outcome, Section
from benchmarks.faults.mutations import Random, change_bytes, mutate_value, to_json
from benchmarks.faults.processes import run_child, run_cli, scratch_copy
from benchmarks.faults.tampering import NEXT, is_told
from benchmarks.faults.world import COMMANDS, OUTPUTS, RUN, STAGES, TRAINED_STAGES, World, expect_same

NOT_VOUCHED = ("created_at",)  # nothing depends on it
BYTES_OF = 5  # one mutation in so many changes bytes instead of values


def mutate_json(file: Path, rng: Random) -> str:
    """Mutate one value of a JSON file, or its bytes, until it says another thing; return what was done."""
    data = changed = file.read_bytes()
    while says_the_same(data, changed):
        if rng.randrange(BYTES_OF) == 0:
            changed, what = change_bytes(data, rng)
        else:
            value, what = mutate_value(json.loads(data), rng)
            changed = to_json(value).encode("utf-8", "surrogatepass")
    file.write_bytes(changed)
    return what


def says_the_same(data: bytes, other: bytes, but: Sequence[str] = ()) -> bool:
    """Return whether two JSON files have the same value, but for some of the outermost keys."""
    try:
        values = [json.loads(text) for text in (data, other)]
    except (ValueError, RecursionError):
        return False
    for value in values:
        for key in but if isinstance(value, dict) else ():
            value.pop(key, None)
    return str(values[0]) == str(values[1])  # as text, because 1 equals True


def _manifest(case: Case, outcome: Outcome) -> None:
    """Mutate an artifact's manifest; `show` and the next stage must say so."""
    stage = case.what[1]
    follower = NEXT.get(stage)
    names = case.world.needs(follower) if follower else [OUTPUTS[stage]]
    with scratch_copy(case.folder, case.world.folder, names) as folder:
        run_cli(["show", OUTPUTS[stage]], folder)
        file = folder / OUTPUTS[stage] / "manifest.json"
        before = file.read_bytes()
        what = mutate_json(file, case.random)
        counts = not says_the_same(before, file.read_bytes(), NOT_VOUCHED)
        outcome.command = f"{stage}/manifest.json: {what}; then rlhf show runs/world/{stage} --verify"
        shown = outcome.saw(run_cli(["show", OUTPUTS[stage], "--verify"], folder))
        run = outcome.saw(run_cli(["show", RUN], folder))
        if counts and not shown.tracebacks:
            told = shown.is_refusal or is_told(shown)
            key = what.split(" ")[0].split(".")[0]
            outcome.expect(told, f"show --verify passes a mutated manifest: {key}")
        outcome.expect(run.code == 0 or run.is_refusal or bool(run.tracebacks), f"show: {run.summary}")
        if follower:
            opened = outcome.saw(run_cli(COMMANDS[follower], folder))
            fine = opened.code == 0 or opened.is_refusal or bool(opened.tracebacks)
            outcome.expect(fine, f"{follower}: {opened.summary}")


def _reward_json(case: Case, outcome: Outcome) -> None:
    """Mutate reward.json of a folder that no manifest vouches for, as a download may be."""
    with scratch_copy(case.folder, case.world.folder, case.world.needs("score")) as folder:
        reward = folder / OUTPUTS["reward"]
        for name in ("manifest.json", "config.yaml"):
            (reward / name).unlink()
        what = mutate_json(reward / "reward.json", case.random)
        outcome.command = f"reward.json without a manifest: {what}; then rlhf {' '.join(COMMANDS['score'])}"
        result = outcome.saw(run_cli(COMMANDS["score"], folder))
        if not result.tracebacks:
            fine = result.code == 0 or result.is_refusal
            outcome.expect(fine, f"score with a mutated reward.json: {result.summary}")


def _fingerprint(case: Case, outcome: Outcome) -> None:
    """Mutate fingerprint.json of an interrupted stage: it begins anew, or is refused."""
    stage = case.what[1]
    with scratch_copy(case.folder, case.world.folder, case.world.needs(stage)) as folder:
        partial = folder / RUN / f".{stage}.partial"
        shutil.copytree(case.world.partials / partial.name, partial)
        what = mutate_json(partial / "fingerprint.json", case.random)
        outcome.command = f".{stage}.partial/fingerprint.json: {what}; then rlhf {' '.join(COMMANDS[stage])}"
        result = outcome.saw(run_cli(COMMANDS[stage], folder))
        if result.code == 0:
            expect_same(outcome, folder / OUTPUTS[stage], case.world.reference(stage).identity)
        elif not result.tracebacks:
            outcome.expect(result.is_refusal, f"{stage}: {result.summary}")


def _hash_cache(case: Case, outcome: Outcome) -> None:
    """Mutate the user's cache of hashes: it is read again, or not at all."""
    stage = case.what[1]

    def show() -> int:
        from pipeline.artifacts import files
        from pipeline.cli import main

        files.CACHE = Path.cwd() / "hashes"
        return main(["show", OUTPUTS[stage]])

    with scratch_copy(case.folder, case.world.folder, [OUTPUTS[stage]]) as folder:
        run_child(show, folder)
        for file in (folder / "hashes").glob("*"):
            what = mutate_json(file, case.random)
            outcome.command = f"the cache of hashes: {what}; then rlhf show {OUTPUTS[stage]}"
        result = outcome.saw(run_child(show, folder))
        if not result.tracebacks:
            fine = result.code == 0 or result.is_refusal
            outcome.expect(fine, f"show with a mutated cache: {result.summary}")


TRIES: dict[str, Callable[[Case, Outcome], None]] = {
    "manifest": _manifest,
    "reward": _reward_json,
    "fingerprint": _fingerprint,
    "cache": _hash_cache,
}


def plan(world: World) -> list[tuple[str, str]]:
    """Manifests of every artifact most of all; each case draws its own mutation."""
    manifests = [("manifest", stage) for stage in STAGES] * 3
    return [
        *manifests,
        *[("reward", "reward")] * 6,
        *(("fingerprint", stage) for stage in TRAINED_STAGES),
        *(("cache", stage) for stage in ("prepare", "reward")),
    ]


def run(case: Case) -> Outcome:
    """Mutate one file."""
    outcome = Outcome()
    TRIES[case.what[0]](case, outcome)
    outcome.figures[case.what[0]] += 1
    return outcome


SECTION = Section(
    "manifests",
    plan,
    run,
    "mutated manifests {manifest}, reward.json {reward}, fingerprints {fingerprint}, caches {cache}",
    full=400,
    short=40,
)
