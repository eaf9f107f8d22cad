"""The fault harness itself: mutations change what they are given, disturbances come where they are meant to,
and a broken promise is counted.
"""

import json
import os
import select
import signal
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.faults import rewards, rows, tampering
from benchmarks.faults.cases import Case, Outcome, Section, choose, kind_of_problem, random_of
from benchmarks.faults.manifests import mutate_json, says_the_same
from benchmarks.faults.mutations import BYTE_CHANGES, RAW, change_bytes, mutate_value, places, to_json
from benchmarks.faults.processes import TRACEBACK, AtChange, Limits, Result, Signal, run_child, scratch_copy
from benchmarks.faults.run import SECTIONS, format_broken, format_table
from benchmarks.faults.world import INPUTS, World, files_in

VALUE = {"prompt": "Q?", "messages": [{"role": "user", "content": "A"}], "rank": 1}


# Mutations


@pytest.mark.parametrize("how", BYTE_CHANGES)
@given(data=st.binary(max_size=60), seed=st.integers(0, 1000))
def test_each_change_of_bytes_changes_them(how, data, seed):
    assert change_bytes(data, Random(seed), how)[0] != data


def test_a_flip_changes_one_bit():
    data = bytes(range(50))
    changed, what = change_bytes(data, Random(0), "flip")
    (pair,) = [pair for pair in zip(data, changed, strict=True) if pair[0] != pair[1]]
    assert what == "flip"
    assert (pair[0] ^ pair[1]).bit_count() == 1


def test_every_place_of_a_value_is_found():
    expected = [("prompt",), ("messages",), ("messages", 0)]
    expected += [("messages", 0, "role"), ("messages", 0, "content"), ("rank",)]
    assert list(places(VALUE)) == expected


def test_a_mutated_value_is_a_copy():
    before = json.dumps(VALUE)
    mutated = [to_json(mutate_value(VALUE, Random(seed))[0]) for seed in range(60)]
    assert json.dumps(VALUE) == before
    assert len(set(mutated)) > 25


def test_raw_text_is_written_as_it_is():
    assert to_json({"a": "@digits@", "b": ["@nan@"]}) == '{"a": ' + "9" * 5000 + ', "b": [NaN]}'
    assert all(to_json(f"@{name}@") == raw for name, raw in RAW.items())


def test_a_json_file_says_another_thing_afterwards(tmp_path):
    file, data = tmp_path / "manifest.json", json.dumps(VALUE, indent=2).encode() + b"\n"
    for seed in range(40):
        file.write_bytes(data)
        mutate_json(file, Random(seed))
        assert not says_the_same(data, file.read_bytes())


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (b'{"a": 1, "b": 2}\n', True),
        (b'{"a": 1, "b": 3}', True),
        (b'{"a": true, "b": 2}', False),
        (b"{", False),
    ],
)
def test_json_says_the_same_whatever_its_form_but_for_what_nothing_depends_on(other, same):
    assert says_the_same(b'{ "a": 1, "b": 2 }', other, ["b"]) == same


@pytest.mark.parametrize(("change", "keeps_time"), [("flip", False), ("flip, time kept", True)])
def test_a_flipped_file_keeps_its_size_and_its_time_if_asked(tmp_path, change, keeps_time):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    os.utime(file, ns=(1, 1))
    tampering.change_file(file, change, Random(0))
    assert file.read_bytes() != b"weights"
    assert file.stat().st_size == 7
    assert (file.stat().st_mtime_ns == 1) == keeps_time


def test_rows_are_mutated_in_a_part():
    made = [rows.FORMATS["comparisons"][1](number) for number in range(500)]
    mutated = rows.mutate_rows(made, "rows", Random(1))
    kept = [row for row in mutated if row in made]
    assert 250 < len(kept) < 500 <= len(mutated)


@pytest.mark.parametrize("body", [*rewards.REFUSED.values(), *rewards.ACCEPTED.values()])
def test_each_reward_function_compiles(tmp_path, body):
    rewards._write(tmp_path, body)
    names: dict = {}
    exec((tmp_path / "own_reward.py").read_text(), names)
    assert callable(names["reward"])


# Processes


def test_the_end_of_a_child_is_told(tmp_path):
    def fail():
        print("begun")
        raise KeyError("name")

    failed = run_child(fail, tmp_path)
    assert (failed.code, failed.out, failed.tracebacks) == (1, "begun\n", 1)
    assert failed.summary.startswith("exit 1: KeyError: 'name' (File ")
    assert not failed.is_one_line

    def refuse():
        os.write(2, b"a warning\nerror: runs/a: is no artifact\n")
        return 2

    refused = run_child(refuse, tmp_path)
    assert refused.is_refusal
    assert refused.summary == "exit 2: error: runs/a: is no artifact"
    assert run_child(lambda: None, tmp_path).code == 0
    assert run_child(signal.pause, tmp_path, timeout=0.1).code is None


def write_three() -> None:
    for number in range(3):
        Path(f"{number}.txt").write_text("x")


def test_a_kill_comes_just_before_the_change_that_it_names(tmp_path):
    undisturbed = run_child(write_three, tmp_path)
    assert (undisturbed.code, undisturbed.changes) == (0, 3)
    for file in tmp_path.iterdir():
        file.unlink()

    kill = AtChange(3, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    killed = run_child(write_three, tmp_path, disturbance=kill)
    assert (killed.code, files_in(tmp_path)) == (-signal.SIGKILL, {"0.txt", "1.txt"})


def test_removals_inside_a_folder_are_changes(tmp_path):
    import shutil

    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_text("x")
    seen: list[str] = []
    watched = AtChange(1, lambda path: seen.append(path.name) or print(path.name), lasting=True)
    assert run_child(lambda: shutil.rmtree("a"), tmp_path, disturbance=watched).out.split() == [
        "file",
        "b",
        "a",
    ]


def test_an_error_at_a_change_fails_it(tmp_path):
    def act(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    result = run_child(write_three, tmp_path, disturbance=AtChange(2, act, lasting=True))
    assert result.summary.startswith("exit 1: OSError: [Errno 28] No space left on device")
    assert files_in(tmp_path) == {"0.txt"}


def test_a_signal_reaches_every_process_of_a_launch(tmp_path):
    def work() -> None:
        try:
            signal.pause()
        except KeyboardInterrupt:
            os.write(1, f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n".encode())

    result = run_child(work, tmp_path, processes=2, disturbance=Signal(signal.SIGINT, 0.2))
    assert sorted(result.out.splitlines()) == ["0 of 2", "1 of 2"]
    assert result.code == 0


def test_nothing_that_a_killed_child_started_is_left(tmp_path):
    readable, writable = os.pipe()

    def work() -> None:
        if os.fork() == 0:
            while True:
                signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_child(work, tmp_path).code == -signal.SIGKILL
    os.close(writable)
    assert select.select([readable], [], [], 60)[0]  # closed by the last process that had it
    assert os.read(readable, 1) == b""
    os.close(readable)


def test_the_limits_are_those_of_the_system(tmp_path):
    result = run_child(
        lambda: Path("large").write_bytes(bytes(5000)) and None, tmp_path, limits=Limits(file_bytes=4000)
    )
    assert "OSError: [Errno 27]" in result.err


def test_a_scratch_copy_is_removed(tmp_path):
    (tmp_path / "origin/runs/sft").mkdir(parents=True)
    (tmp_path / "origin/runs/sft/config.json").write_text("{}")
    with scratch_copy(tmp_path / "copy", tmp_path / "origin", ["runs/sft"]) as folder:
        assert files_in(folder) == {"runs", "runs/sft", "runs/sft/config.json"}
    assert files_in(tmp_path / "origin") == {"runs", "runs/sft", "runs/sft/config.json"}
    assert not (tmp_path / "copy").exists()


# Cases


def section(plan) -> Section:
    return Section("kills", lambda world: plan, lambda case: Outcome(), "{kills} kills", 90, 6)


def test_cases_depend_on_the_seed_and_their_number_alone(tmp_path):
    a, world = section(range(50)), World(tmp_path)
    assert choose(a, world, 0, 80)[:10] == choose(a, world, 0, 10)
    assert sorted(choose(a, world, 0, 50)) == list(range(50))
    assert choose(a, world, 1, 50) != choose(a, world, 0, 50)
    assert random_of(a, 0, 3).random() == random_of(a, 0, 3).random() != random_of(a, 0, 4).random()


def test_a_traceback_breaks_a_promise():
    outcome = Outcome("rlhf sft")
    outcome.saw(Result(1, "", f"{TRACEBACK}:\n  File \"a.py\", line 1, in f\nKeyError: 'x'\n", 1.0))
    assert outcome.tracebacks == 1
    assert outcome.problems == ["traceback: exit 1: KeyError: 'x' (File \"a.py\", line 1, in f)"]
    outcome.saw(Result(2, "", "error: a line\n", 1.0))
    assert len(outcome.problems) == 1
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_the_section_of_rows_counts_a_traceback(tmp_path, monkeypatch):
    ended = Result(1, "", f"{TRACEBACK}:\nRecursionError: too deep\n", 1.0)
    monkeypatch.setattr(rows, "run_child", lambda *_, **__: ended)
    (tmp_path / "world/configs").mkdir(parents=True)
    what = ("prompts", "rows.jsonl", "rows")
    outcome = rows.run(Case(World(tmp_path / "world"), tmp_path / "case", what, Random(0)))
    assert outcome.tracebacks == 1
    assert outcome.problems == ["traceback: exit 1: RecursionError: too deep (no frame)"]


@pytest.mark.parametrize(
    ("read", "kept", "lines", "problems"),
    [(10, 8, 2, 0), (10, 7, 2, 1), (10, 8, 1, 1), (9, 7, 2, 1)],
    ids=["accounted for", "one lost", "not in the quarantine", "one not read"],
)
def test_rows_that_are_lost_are_found(tmp_path, read, kept, lines, problems):
    records = tmp_path / rows.RECORDS
    records.mkdir(parents=True)
    counts = {"read": read, "kept": kept, "quarantined": {"empty-text": 2}}
    (records / "manifest.json").write_text(json.dumps({"rows": counts}))
    (records / "quarantine.jsonl").write_text("{}\n" * lines)
    outcome = Outcome()
    rows._account(outcome, tmp_path, 10)
    assert (len(outcome.problems), outcome.figures["read"]) == (problems, read)


def test_what_an_intact_artifact_prints_is_no_warning():
    assert not tampering.is_told(Result(0, "files 9, all read again, none altered\n", "", 1.0))
    assert tampering.is_told(Result(0, "sft: model.safetensors was altered: its SHA-256\n", "", 1.0))


def test_equal_problems_are_of_one_kind():
    one, other = "exit 2: error: data/a/b.csv: 5 rows of 'x'", "exit 2: error: data/c.csv: 17 rows of 'y z'"
    assert kind_of_problem(one) == kind_of_problem(other)
    assert kind_of_problem(one) != kind_of_problem("exit 1: KeyError: 'x'")


def test_the_report_has_every_figure_and_each_kind_of_problem_once():
    broken = [f"left for good: runs/{number}" for number in (1, 2)]
    outcomes = {
        "kills": {
            0: Outcome("rlhf sft", figures=Counter(kills=2, runs=1, identical=1)),
            3: Outcome("rlhf ppo", broken[:1], Counter(kills=1, runs=1)),
            4: Outcome("rlhf ppo", broken[1:], Counter(kills=1, runs=1), tracebacks=1),
        }
    }
    line = " ".join(format_table(outcomes).splitlines()[1].split())
    assert line == "kills 3 1 1 4 kills, results identical in 1 of 3 runs"
    text = format_broken(outcomes, 5)
    assert text.count("left for good") == 1
    assert "kills, 2 times: left for good: runs/1\n    rlhf ppo\n" in text
    assert 'make faults ARGS="--seed 5 --case kills:3"' in text
    assert format_broken({"kills": {0: Outcome("rlhf sft")}}, 5) == ""


def test_the_sections_have_a_short_form_and_the_world_all_inputs():
    assert list(SECTIONS) == ["kills", "rows", "bytes", "manifests", "configs", "machine", "rewards"]
    assert all(0 < section.short < section.full for section in SECTIONS.values())
    assert INPUTS["evaluate"] == ("prepare", "sft", "reward", "ppo")
