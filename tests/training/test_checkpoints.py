"""A run that is stopped goes on from its last whole checkpoint, and ends in the weights of one left alone."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Trainer

from pipeline import cli, config
from pipeline.artifacts.manifest import work_folder
from pipeline.artifacts.seals import list_checkpoints, seal_folder, sealed_steps
from pipeline.cli import commands
from pipeline.errors import Stopped, UserError
from pipeline.ppo import stage as ppo
from pipeline.reward import stage as reward
from pipeline.sft import stage as sft
from pipeline.training import checkpoints
from pipeline.training.checkpoints import (
    check_owner,
    last_checkpoint,
    read_launch,
    rotate_checkpoints,
    train_with_resume,
)

pytestmark = pytest.mark.long


def checkpoint(work: Path, step: int, sealed: bool = True) -> Path:
    folder = work / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 20}))
    if sealed:
        seal_folder(folder, step)
    return folder


def test_the_newest_whole_checkpoint_counts_and_newer_ones_are_told_and_deleted(tmp_path, capsys):
    older, whole = checkpoint(tmp_path, 2), checkpoint(tmp_path, 10)
    broken, unsealed = checkpoint(tmp_path, 9_000), checkpoint(tmp_path, 10_000, sealed=False)
    (broken / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == whole
    assert (older.exists(), broken.exists(), unsealed.exists()) == (True, False, False)
    assert capsys.readouterr().out == (
        "  deleted checkpoint-10000: it was not completely written; "
        "checkpoint-9000: trainer_state.json is missing; resuming from step 10\n"
    )


def test_without_a_whole_checkpoint_training_begins_anew(tmp_path, capsys):
    assert last_checkpoint(tmp_path) is None
    assert capsys.readouterr().out == ""
    checkpoint(tmp_path, 3, sealed=False)
    (tmp_path / "samples").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.endswith("not completely written; training begins anew\n")


def test_rotation_goes_by_step_and_counts_only_whole_ones(tmp_path):
    for step in (8, 9, 10, 11):
        folder = checkpoint(tmp_path, step)
        os.utime(folder, (1000 - step, 1000 - step))  # the clock goes backwards
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    rotate_checkpoints(tmp_path, None)
    assert list(list_checkpoints(tmp_path)) == [8, 9, 10, 11]
    rotate_checkpoints(tmp_path, 2)
    assert list(list_checkpoints(tmp_path)) == [9, 11]
    checkpoint(tmp_path, 12)
    rotate_checkpoints(tmp_path, 2, best="checkpoint-9")
    assert list(list_checkpoints(tmp_path)) == [9, 12]
    rotate_checkpoints(tmp_path, 1, best="checkpoint-9")
    assert list(list_checkpoints(tmp_path)) == [9, 12]
    rotate_checkpoints(tmp_path, 1)
    assert list(list_checkpoints(tmp_path)) == [12]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720])
def test_a_checkpoint_that_others_could_write_is_not_read(mode, tmp_path):
    checkpoint(tmp_path, 1)
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match=f"other users can write to it \\(mode {mode:o}\\).*: chmod -R go-w"):
        last_checkpoint(tmp_path)
    tmp_path.chmod(0o755)
    assert last_checkpoint(tmp_path)


def test_a_folder_without_rights_for_others_protects_what_is_in_it(tmp_path):
    file = checkpoint(tmp_path, 1) / "trainer_state.json"
    file.chmod(0o664)
    tmp_path.chmod(0o700)
    check_owner(tmp_path)
    tmp_path.chmod(0o755)
    with pytest.raises(UserError, match=r"trainer_state\.json: other users can write to it \(mode 664\)"):
        check_owner(tmp_path)


def test_a_checkpoint_of_another_user_is_not_read(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1)
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(
        UserError, match=f"belongs to user {owner}, and this process runs as user {owner + 1}"
    ):
        last_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "launch", ["", "[]", '{"processes": "2", "sharded_by": "nothing"}', '{"processes": 2}']
)
def test_a_launch_file_of_another_form_is_none(launch, tmp_path):
    (tmp_path / "begun.json").write_text(launch)
    assert read_launch(tmp_path) == {}


@pytest.mark.parametrize(("free", "expected"), [(0, OSError), (2**30, RuntimeError)])
def test_a_checkpoint_cut_short_by_a_full_disk_is_told_from_other_failures(
    tmp_path, monkeypatch, free, expected
):
    def train(**_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 2737088 vs 2736980")

    monkeypatch.setattr(
        checkpoints.shutil, "disk_usage", lambda place: {tmp_path: SimpleNamespace(free=free)}[place]
    )
    with pytest.raises(expected) as error:
        train_with_resume(
            SimpleNamespace(
                args=SimpleNamespace(save_total_limit=2),
                add_callback=print,
                train=train,
                remove_callback=lambda _: None,
                callback_handler=SimpleNamespace(callbacks=[]),
            ),
            tmp_path,
        )
    assert expected is RuntimeError or (error.value.errno, error.value.filename) == (
        errno.ENOSPC,
        str(tmp_path),
    )


GOLD = {"reward": "pipeline.prepare.demo:gold_reward"}
STAGES = {
    "sft": (sft, config.SFTStage, {"max_length": 96}, {"max_steps": 3}),
    "reward": (reward, config.RewardStage, {"max_length": 64}, {"max_steps": 3}),
    "ppo": (
        ppo,
        config.PPOStage,
        GOLD,
        {"num_rollouts": 2, "num_ppo_epochs": 2, "response_tokens": 4, "per_device_train_batch_size": 2},
    ),
    "rloo": (
        ppo,
        config.PPOStage,
        GOLD | {"algorithm": "rloo"},
        {"max_steps": 3, "num_generations": 2, "max_completion_length": 4, "per_device_train_batch_size": 4},
    ),
}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def build(tiny_records, tiny_gpt2):
    """Returns a function of (name, runs) that returns the stage's module and its config."""

    def built(name: str, runs: Path, **changes):
        module, cls, more, training = STAGES[name]
        model = {"policy" if cls is config.PPOStage else "model": str(tiny_gpt2)}
        training = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "eval_strategy": "no"} | training
        common = {"run": "t", "runs": str(runs), "records": str(tiny_records)}
        return module, cls(training=training | changes, **common | model | more)

    return built


@pytest.fixture(scope="module")
def whole(build, tmp_path_factory):
    """Returns a function of a stage's name that returns the artifact of a run that was left alone."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            module, stage = build(name, tmp_path_factory.mktemp(name))
            folders[name] = module.run(stage)
        return folders[name]

    return get


def fail_to_save(module, stage) -> None:
    """Run a stage that fails after its last checkpoint."""

    def fail(*_):
        raise RuntimeError("saving failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_log", fail)
        with pytest.raises(RuntimeError, match="saving failed"):
            module.run(stage)


def count_steps(monkeypatch, at=None, act=lambda: None) -> list[int]:
    """Count the training steps, and call `act` in step number `at`."""
    steps: list[int] = []
    step = Trainer.training_step

    def counted(*args):
        steps.append(1)
        if len(steps) == at:
            act()
        return step(*args)

    monkeypatch.setattr(Trainer, "training_step", counted)
    return steps


@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_fails_to_save_goes_on_from_its_last_step(name, build, whole, tmp_path, monkeypatch):
    """With the weights of that checkpoint, and no further step."""
    expected, (module, stage) = whole(name), build(name, tmp_path)
    fail_to_save(module, stage)
    steps = count_steps(monkeypatch)
    folder = module.run(stage)
    assert steps == []
    assert (folder / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    entries, others = (
        [json.loads(line) for line in (path / "log.jsonl").open(encoding="utf-8")]
        for path in (folder, expected)
    )
    evaluations = [[entry.get("eval_loss") for entry in log] for log in (entries, others)]
    assert evaluations[0] == evaluations[1]
    assert not [entry for entry in entries if "train_loss" in entry]


# PPO stops after the rollout, which has two steps.
@pytest.mark.parametrize(("name", "saved"), [("sft", 1), ("reward", 1), ("ppo", 2)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_run_ends_in_the_same_bits(
    name, saved, number, build, whole, tmp_path, monkeypatch, capfd
):
    expected, (module, stage) = whole(name), build(name, tmp_path)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        count_steps(patch, 1, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped) as stopped:
            module.run(stage)
    assert stopped.value.number == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert sealed_steps(work_folder(stage.folder)) == [saved]
    assert work_folder(stage.folder).stat().st_mode & 0o777 == 0o700
    assert f"{number.name}: saving a checkpoint after this" in capfd.readouterr().err

    folder = module.run(stage)
    assert (folder / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert not list(folder.rglob("checkpoint.json"))


def test_a_second_signal_stops_at_once(build, tmp_path, monkeypatch):
    module, stage = build("sft", tmp_path)
    steps = count_steps(monkeypatch, 2, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    with pytest.raises(Stopped):
        module.run(stage)
    assert len(steps) == 2
    assert sealed_steps(work_folder(stage.folder)) == []


@pytest.mark.parametrize(
    ("at", "saved", "told"),
    [
        (2, [2], "saved step 2; the same command resumes sft from step 2"),
        (0, [], "the same command begins sft again"),
    ],
)
def test_what_the_command_says_of_resuming_is_true(at, saved, told, build, tmp_path, monkeypatch, capsys):
    module, stage = build("sft", tmp_path)
    monkeypatch.setattr(commands.config, "load", lambda *_, **__: stage)

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    if at:
        count_steps(monkeypatch, at, stop)
    else:
        monkeypatch.setattr(module, "load_base", lambda *_: stop())
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["sft", "--config", "any"]) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped by SIGTERM; published artifacts are unchanged; {told}"
    assert sealed_steps(work_folder(stage.folder)) == saved


BREAKS = {
    "optimizer.pt gone": lambda folder: (folder / "optimizer.pt").unlink(),
    "weights cut": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "state cut": lambda folder: os.truncate(folder / "trainer_state.json", 20),
    "random numbers changed": lambda folder: flip(folder / "rng_state.pth"),
    "seal gone": lambda folder: (folder / "checkpoint.json").unlink(),
    "all gone": lambda folder: [shutil.rmtree(each) for each in folder.parent.glob("checkpoint-*")],
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("broken", BREAKS)
def test_a_checkpoint_that_is_not_whole_is_skipped_for_the_older_one(
    name, broken, whole, tmp_path, monkeypatch, stopped
):
    module, stage, saved = stopped(name, tmp_path)
    BREAKS[broken](work_folder(stage.folder) / f"checkpoint-{saved[-1]}")
    steps = count_steps(monkeypatch)
    folder = module.run(stage)
    total = 4 if name == "ppo" else 3
    assert len(steps) == total - (0 if broken == "all gone" else saved[-2])
    assert (folder / WEIGHTS).read_bytes() == (whole(name) / WEIGHTS).read_bytes()


WORK_BREAKS = {
    "best cut": lambda work: os.truncate(work / "best/critic/value_head.safetensors", 10),
    "best gone": lambda work: shutil.rmtree(work / "best"),
    "policy gone": lambda work: (work / "policies/step-000002/model.safetensors").unlink(),
    "samples cut": lambda work: os.truncate(work / "samples/step-000002.jsonl", 10),
    "launch gone": lambda work: (work / "begun.json").unlink(),
}


@pytest.fixture(scope="module")
def with_policies(build, tmp_path_factory):
    """A whole PPO run that keeps the policy of each evaluation, and a function of `runs` to stop one."""
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}

    def make(runs: Path):
        module, stage = build("ppo", runs, **changes)
        return module, stage.model_copy(
            update={"evaluation": stage.evaluation.model_copy(update={"keep": True})}
        )

    module, stage = make(tmp_path_factory.mktemp("kept"))
    return module.run(stage), make


def content(folder: Path) -> dict[str, bytes]:
    """The files of an artifact but those that name its folder or the time."""
    skipped = ("manifest.json", "config.yaml")
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in skipped)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("broken", WORK_BREAKS)
def test_what_a_checkpoint_relies_on_beside_it_belongs_to_it(
    broken, with_policies, tmp_path, monkeypatch, capsys
):
    expected, make = with_policies
    module, stage = make(tmp_path)
    fail_to_save(module, stage)
    WORK_BREAKS[broken](work_folder(stage.folder))
    steps = count_steps(monkeypatch)
    folder = module.run(stage)
    assert "beside it is missing or was altered; " in capsys.readouterr().out
    assert len(steps) in (2, 4)  # from the first checkpoint, if that did not rely on it
    assert content(folder) == content(expected)
    assert {"best/critic/value_head.safetensors", "policies/step-000002/model.safetensors"} <= content(
        folder
    ).keys()


@pytest.fixture(scope="module")
def stopped(build, tmp_path_factory):
    """Returns a function of (name, runs): a copy of a run that has all checkpoints and no artifact."""
    made: dict[str, Path] = {}

    def copy(name: str, runs: Path):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"{name}-stopped")
            module, stage = build(name, made[name], save_steps=1)
            fail_to_save(module, stage)
        shutil.copytree(made[name], runs, dirs_exist_ok=True)
        module, stage = build(name, runs, save_steps=1)
        file = work_folder(stage.folder).parent / "fingerprint.json"
        text = file.read_text().replace(str(made[name]), str(runs))
        file.write_text(text)
        return module, stage, sealed_steps(work_folder(stage.folder))

    return copy


@pytest.mark.parametrize("name", STAGES)
def test_a_training_that_is_not_finite_stops_and_publishes_nothing(name, build, tmp_path, monkeypatch):
    module, stage = build(name, tmp_path, learning_rate=1e30, save_steps=1, max_grad_norm=1.0)
    if name == "rloo":  # which learns nothing from equal rewards
        (tmp_path / "lengths.py").write_text("def letters(completions, **_): return [*map(len, completions)]")
        monkeypatch.syspath_prepend(tmp_path)
        stage = stage.model_copy(update={"reward": [config.Reward(source="lengths:letters")]})
    with pytest.raises(UserError) as error:
        module.run(stage)
    message = str(error.value)
    assert message.startswith(f"{stage.stage}: ")
    assert "not finite" in message
    assert "training.learning_rate" in message
    assert not stage.folder.exists()


def test_a_reward_model_that_scores_nan_is_not_published(build, tmp_path):
    """After its only step, the weights are finite and the scores are not."""
    module, stage = build("reward", tmp_path, learning_rate=1e30, max_steps=1)
    with pytest.raises(UserError, match="the reward of a response is not finite"):
        module.run(stage)
    assert not stage.folder.exists()
