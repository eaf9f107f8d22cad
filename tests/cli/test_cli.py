"""Exit codes, and one line instead of a traceback."""

import errno
import gc
import io
import json
import os
import re
import shlex
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from pipeline import cli, config
from pipeline.cli import commands
from pipeline.cli.parser import parse
from pipeline.cli.quiet import silence_libraries
from pipeline.errors import Stopped, UserError

DEMO = config.RECIPES / "demo"
STAGES = list(config.STAGES)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fail(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The one line on stderr with which `rlhf argv` ends."""
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    return err


def stage(name: str, *argv: str) -> tuple[str, ...]:
    return (name, "--config", str(DEMO / f"{name}.yaml"), *argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("run", "--recipe", "dmo"), "--recipe dmo: no such recipe; did you mean 'demo'?"),
        (("sft", "--config", "none/sft.yaml"), "none/sft.yaml: no such config file"),
        (
            ("sft", "--config", "demo"),
            "demo: no such config file; did you mean --config configs/demo/sft.yaml?",
        ),
        (("run", "--run", "../x"), "run='../x'"),
        (
            ("run", "prepare.source.path=*.csv"),
            "override 'source.path=*.csv': its value is not readable as YAML",
        ),
        (
            ("run", "prepare.splits.test=0", "prepare.splits.validation=0"),
            "evaluate needs held-out prompts; set splits.test=0.1",
        ),
        (("run", "ppo.training.num_rollouts=0"), "ppo: training: num_rollouts=0: expected more than 0"),
        (
            ("run", "sft.lora={r: 4}"),
            "an adapter's base would exist nowhere else; remove the 'lora:' section",
        ),
        (
            ("run", "sft.model=a", "sft.scratch=null", "sft.lora={r: 4}"),
            "ppo has no 'lora:' section; set ppo.lora={}",
        ),
        (
            ("run", "ppo.training.learnin_rate=1"),
            "ppo: training.learnin_rate: PPOConfig has no such key; did you mean 'learning_rate'?",
        ),
        (("run", "evaluate.gold=nowhere:gold"), "gold (nowhere:gold): No module named 'nowhere'"),
        (stage("sft", "max_lenght=5"), "unknown key 'max_lenght'; did you mean 'max_length'?"),
        (("run", "sft.max_lenght=5"), "unknown key 'max_lenght'; did you mean 'max_length'?"),
        (stage("sft", "max_length"), "override 'max_length': expected key=value"),
        (("run", "dmo"), "--recipe dmo: no such recipe; did you mean 'demo'?"),
        (
            ("run", "reward.learning_rate=1e-4"),
            "override 'reward.learning_rate=1e-4': reward has no key 'learning_rate'; "
            "type reward.training.learning_rate=1e-4",
        ),
        (("run", "--until", "ppo", "r=4"), "ppo has no key 'r'; type sft.lora.r=4 or reward.lora.r=4"),
        (("run", "max_length=5"), "evaluate has no key 'max_length'; type sft.max_length=5 or reward."),
        (("run", "training.max_steps=5"), "type sft.training.max_steps=5 or reward.training.max_steps=5 or"),
        (("run", "prepare.path=a.csv"), "prepare has no key 'path'; type prepare.source.path=a.csv"),
        (stage("reward", "max_steps=5"), "reward has no key 'max_steps'; type training.max_steps=5"),
        (stage("sft", "sft.max_length=5"), "sft has no key 'sft'; type max_length=5"),
        (
            stage("sft", "training.run_name=2024"),
            "training.run_name=2024: expected text, which YAML reads so in quotes: '\"2024\"' on the",
        ),
        (
            ("run", "--until", "sft", "reward.max_length=5"),
            "override 'reward.max_length=5': the run ends with 'sft', before 'reward'",
        ),
        (stage("ppo", "--seed", "-1"), "seed=-1"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    argv: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = fail(capsys, *argv)
    assert message.startswith("error: ")
    assert expected in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv", [(), ("trian",), ("sft",), ("run", "--until", "trian"), stage("sft", "--seed", "one")]
)
def test_a_command_line_that_is_none_exits_2(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"error: .*; see rlhf.* --help\n", message)


@pytest.mark.parametrize("run", ["demo", "trial"])
@pytest.mark.parametrize("name", STAGES[1:])
def test_a_missing_upstream_artifact_is_told_with_the_command_that_makes_it(
    name: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fail(capsys, *stage(name, "--run", run))
    assert f"runs/{run}/prepare: does not exist" in message
    command = re.search(r"run: rlhf (.*)$", message)
    assert command
    assert cli.main([*shlex.split(command[1]), "--dry-run"]) == 0
    assert f"prepare: would write runs/{run}/prepare\n" in capsys.readouterr().out


# `save_pretrained` raises this on a full disk, which is no OSError.
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
FAILURES = {
    "interrupted": (KeyboardInterrupt(), 130, "stopped by SIGINT; published artifacts are unchanged; "),
    "ended by a cluster": (Stopped(15), 143, "stopped by SIGTERM; published artifacts are unchanged; "),
    "disk full": (
        OSError(errno.ENOSPC, "No space left on device", "runs/a/b"),
        1,
        "error: no space left on the disk for runs/a/b;",
    ),
    "disk full in safetensors": (FULL, 1, "error: no space left on the disk"),
    "unreadable": (
        PermissionError(errno.EACCES, "Permission denied", "data.csv"),
        1,
        "error: data.csv: Permission denied",
    ),
    "user": (UserError("first\n  second"), 2, "error: first second"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_stage_fails_with_decides_the_exit_code(
    name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, code, expected = FAILURES[name]

    def explode(loaded: config.StageConfig) -> None:
        raise error

    monkeypatch.setattr(commands, "_run", explode)
    assert fail(capsys, *stage("sft"), code=code).startswith(expected)
    with pytest.raises(type(error)):
        cli.main(stage("sft", "--debug"))


@pytest.mark.parametrize("argv", [stage("evaluate"), ["run", "--recipe", "demo"]])
def test_the_table_of_an_evaluation_is_printed_once(
    argv: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.evaluate import summary

    monkeypatch.setattr(commands, "_run", lambda loaded: None)
    monkeypatch.setattr(summary, "summary_table", lambda folder: f"table of {folder.name}")
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.count("table of evaluate\n") == 1


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_run", None)  # the caller, which is ours, fails
    with pytest.raises(TypeError):
        cli.main(stage("sft"))


def test_an_error_of_a_library_is_one_line_with_its_stage(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.sft import stage as sft

    monkeypatch.setattr(sft, "open_inputs", lambda config: json.loads("{\n'a'}"))
    assert fail(capsys, *stage("sft"), code=1) == (
        "error: sft: JSONDecodeError: Expecting property name enclosed in double quotes: line 2 column 1 "
        "(char 2); add --debug for the traceback\n"
    )
    with pytest.raises(json.JSONDecodeError):
        cli.main(stage("sft", "--debug"))


def test_the_stage_of_a_run_is_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.prepare import stage as prepare

    monkeypatch.setattr(prepare, "build_artifact", lambda *_, **__: json.loads(""))
    assert fail(capsys, "run", code=1).startswith("error: prepare: JSONDecodeError: ")


def test_a_stage_s_memory_is_free_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.callbacks = [self]  # a cycle, which counting references never frees

    trainers: list[weakref.ref[Trainer]] = []
    stage_module = SimpleNamespace(run=lambda loaded: trainers.append(weakref.ref(Trainer())))
    monkeypatch.setattr(commands, "import_module", lambda name: stage_module)
    gc.disable()
    try:
        commands._run(config.load("sft", DEMO / "sft.yaml"))
    finally:
        gc.enable()
    assert [trainer() for trainer in trainers] == [None]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB")])
def test_running_out_of_memory_is_no_bug(
    error: Exception, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(loaded: config.StageConfig) -> None:
        raise error

    monkeypatch.setitem(explode.__globals__, "__name__", "pipeline.ppo.trainer")
    monkeypatch.setattr(commands, "_run", explode)
    assert type(error).__name__ in fail(capsys, *stage("sft"), code=1)


@pytest.mark.parametrize(
    ("argv", "run"), [((), "demo"), (("--run", "trial"), "trial"), (("--recipe", str(DEMO)), "demo")]
)
@pytest.mark.parametrize("until", ["sft", "evaluate"])
def test_dry_run_prints_every_stage_and_its_folder(
    argv: tuple[str, ...], run: str, until: str, capsys: Any, tmp_path: Path
) -> None:
    assert cli.main(["run", "--dry-run", "--until", until, *argv]) == 0
    written = STAGES[: STAGES.index(until) + 1]
    assert capsys.readouterr().out.splitlines() == [
        f"{name}: would write runs/{run}/{name}" for name in written
    ]
    assert not list(tmp_path.iterdir())


def test_overrides_go_to_the_stage_they_name_and_bare_ones_to_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(commands, "_run", ran.append)
    argv = ["run", "--until", "ppo", "--seed", "3", "--force"]
    assert (
        cli.main(
            [
                *argv,
                "sft.max_length=99",
                "reward.training.max_steps=7",
                "max_prompt_tokens=11",
                "training.kl_coef=0.5",
            ]
        )
        == 0
    )
    sft, reward, ppo = ran[1:]
    assert [loaded.stage for loaded in ran] == STAGES[:4]
    assert {(loaded.seed, loaded.force) for loaded in ran} == {(3, True)}
    assert (sft.max_length, reward.max_length, ppo.max_prompt_tokens) == (99, 128, 11)
    assert (reward.training["max_steps"], ppo.training["kl_coef"]) == (7, 0.5)
    assert sft.training["max_steps"] != 7


@pytest.mark.parametrize(
    "argv", [("demo",), ("--recipe", "demo"), (str(DEMO),), ("--seed", "1", "demo"), ("run=a", "demo")]
)
def test_a_bare_word_of_run_is_the_recipe(argv: tuple[str, ...]) -> None:
    args = parse(["run", *argv])
    assert args.recipe in ("demo", str(DEMO))
    assert args.overrides == [item for item in argv if "=" in item]


def test_run_takes_one_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["run", "--recipe", "demo", "sums", "seed=1"])
    assert "run: expected one recipe, found sums, demo; an override is key=value" in capsys.readouterr().err


def test_what_is_common_to_all_stages_goes_to_all_and_options_may_stand_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(commands, "_run", ran.append)
    assert (
        cli.main(["run", "runs=here", "--until", "reward", "seed=7", "--run", "mine", "sft.max_length=99"])
        == 0
    )
    assert [(str(loaded.folder), loaded.seed) for loaded in ran] == [
        (f"here/mine/{stage}", 7) for stage in STAGES[:3]
    ]
    assert ran[1].max_length == 99


def test_every_config_is_checked_before_the_first_stage_starts(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_run", lambda loaded: pytest.fail("started"))
    fail(capsys, "run", "evaluate.best_of=1")


def test_a_reader_that_has_enough_is_no_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "completion", "bash"]
    environment = os.environ | {"PYTHONPATH": str(config.RECIPES.parent)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


# The command `config`


def test_config_prints_a_key_a_section_or_all(capsys: Any) -> None:
    assert cli.main(["config", "ppo", "training.kl_coef"]) == 0
    assert capsys.readouterr().out.startswith(
        "training.kl_coef  (number, default 0.05)\n    Coefficient of the KL penalty"
    )
    assert cli.main(["config", "prepare", "splits"]) == 0
    names = re.findall(r"^(\S+)  \(", capsys.readouterr().out, re.M)
    assert names == ["splits", "splits.validation", "splits.test"]
    assert cli.main(["config", "sft"]) == 0
    assert "\n  training: trl.SFTConfig  https://huggingface.co/docs/trl/" in capsys.readouterr().out


def test_config_prints_the_schema(capsys: Any) -> None:
    assert cli.main(["config", "reward", "--schema"]) == 0
    assert capsys.readouterr().out == (config.RECIPES / "schemas" / "reward.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("ppo", "training.kl_coeff"), "no key 'training.kl_coeff'; did you mean 'kl_coef'?"),
        (("ppo", "evaluatoin"), "no key 'evaluatoin'; did you mean 'evaluation'?"),
        (("prepare", "source.limti"), "no key 'source.limti'; did you mean 'limit'?"),
        (
            ("sft", "lora.r"),
            "for the libraries' own see https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig",
        ),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_name(
    argv: tuple[str, ...], expected: str, capsys: Any
) -> None:
    assert expected in fail(capsys, "config", *argv)


# Before torch

START = """
import sys
from pipeline.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
print(code, sorted({"torch", "transformers", "trl", "datasets", "peft"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "argv",
    [
        ("--help",),
        ("push", "--help"),
        ("show", "RUN"),
        ("show", "ARTIFACT"),
        ("show", "ARTIFACT", "OTHER"),
        ("config", "prepare"),
        ("config", "ppo", "training"),
        ("config", "ppo", "--schema"),
        ("completion", "bash"),
    ],
    ids=" ".join,
)
def test_it_starts_without_torch(argv: tuple[str, ...], tiny_records: Path, tiny_feedback: Path) -> None:
    folders = {"RUN": tiny_records.parent, "ARTIFACT": tiny_records, "OTHER": tiny_feedback}
    command = [sys.executable, "-c", START, *(str(folders.get(word, word)) for word in argv)]
    environment = os.environ | {"PYTHONPATH": str(config.RECIPES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == "0 []\n"
    assert done.stdout


def test_a_file_in_the_working_folder_hides_no_library_from_the_module(tmp_path: Path) -> None:
    """`python -m` has the folder first in its path, and `accelerate launch -m` starts that."""
    (tmp_path / "shtab.py").write_text("raise SystemExit('this is no library')")
    environment = os.environ | {"PYTHONPATH": str(config.RECIPES.parent)}
    argv = [sys.executable, "-m", "pipeline", "completion", "bash"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "_shtab_rlhf" in done.stdout


def test_the_bars_of_transformers_leave_nothing_behind() -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.set_tqdm_hook(None)
    try:
        silence_libraries()
        terminal = io.StringIO()
        transformers_logging.enable_progress_bar()
        for _ in transformers_logging.tqdm(range(3), desc="Loading weights", file=terminal, ncols=60):
            pass
    finally:
        transformers_logging.set_tqdm_hook(before)
        transformers_logging.disable_progress_bar()
    written = terminal.getvalue()
    assert "Loading weights" in written
    assert "\n" not in written
    assert written.endswith("\r")
    assert not written.split("\r")[-2].strip()
