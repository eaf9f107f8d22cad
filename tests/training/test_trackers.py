"""Trackers: what TensorBoard shows is what the log holds, over an interruption; what could not report is
refused before the work.
"""

import json
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import cli, config
from pipeline.artifacts.manifest import read_manifest, work_folder
from pipeline.errors import UserError
from pipeline.sft import stage as sft
from pipeline.training import trackers
from pipeline.training.callbacks import PrintProgress

STEPS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
}


def test_tensorboard_holds_the_log_and_goes_on_after_an_interruption(
    tmp_path: Path, tiny_records: Path, tiny_gpt2: Path
) -> None:
    common = {
        "run": "t",
        "runs": str(tmp_path),
        "model": str(tiny_gpt2),
        "records": str(tiny_records),
        "max_length": 96,
    }
    stage = config.SFTStage(training=STEPS | {"report_to": "tensorboard"}, **common)

    def kill(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrintProgress, "on_log", kill)  # after TensorBoard wrote what will be done again
        with pytest.raises(KeyboardInterrupt):
            sft.run(stage)
    folder = sft.run(stage)
    (events,) = (tmp_path / "t" / "logs" / "sft").iterdir()
    found = EventAccumulator(str(events)).Reload()
    log = [json.loads(line) for line in (folder / "log.jsonl").open()]
    for tag, key in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("eval/loss", "eval_loss"),
    ):
        logged = [(entry["step"], pytest.approx(entry[key])) for entry in log if key in entry]
        assert len(logged) >= 2
        assert [(event.step, event.value) for event in found.Scalars(tag)] == logged
    later = datetime.now() + timedelta(
        seconds=2
    )  # a folder is named by the second in which its training starts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackers, "datetime", SimpleNamespace(now=lambda: later))
        sft.run(stage.model_copy(update={"force": True, "seed": 1}))
    assert len(list(events.parent.iterdir())) == 2  # another training, another folder
    assert not [name for name in read_manifest(folder)["files"] if "events" in name]


def test_the_user_s_own_place_for_tensorboard_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "own"))
    trainer: Any = SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=[trackers.TensorBoardCallback()])
    )
    trackers.start_trackers(trainer, work_folder(tmp_path / "t" / "sft"), 0)
    assert len(list((tmp_path / "own").iterdir())) == 1
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("stage", "given", "expected"),
    [
        ("sft", "absent_tracker", "no such tracker; expected all, none, azure_ml, "),
        ("sft", "tensorbord", "no such tracker; did you mean 'tensorboard'?; expected"),
        ("reward", "trackio", "not installed here; pip install trackio, or set training.report_to=none"),
        ("ppo", "[tensorboard,comet_ml]", "not installed here; pip install comet-ml, or set"),
        ("ppo", "wandb", "not logged in; run: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline"),
        ("ppo", "all", "not logged in; run: wandb login"),
    ],
)
def test_a_tracker_that_could_not_report_is_refused_before_the_first_stage(
    stage: str,
    given: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        trackers, "find_spec", lambda name: name if name in ("tensorboard", "wandb") else None
    )
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["run", "--recipe", "demo", f"{stage}.training.report_to={given}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {stage}: training.report_to=")
    assert expected in err
    assert not list(tmp_path.iterdir())


NETRC, SETTINGS = "machine {} login user password " + "k" * 40, "[default]\n{}"


@pytest.mark.parametrize(
    ("environment", "files", "ready"),
    [
        ({}, {}, False),
        ({"WANDB_API_KEY": "k"}, {}, True),
        ({"WANDB_MODE": "offline"}, {}, True),
        ({"WANDB_MODE": "online"}, {".config/wandb/settings": SETTINGS.format("mode = offline")}, False),
        ({}, {".config/wandb/settings": SETTINGS.format("mode = offline")}, True),
        ({}, {"wandb/settings": SETTINGS.format("mode = disabled")}, True),
        ({}, {"wandb/settings": "not settings"}, False),
        ({}, {".netrc": NETRC.format("api.wandb.ai")}, True),
        ({}, {".netrc": NETRC.format("example.org")}, False),
        ({}, {".netrc": "machine"}, False),
        (
            {"WANDB_BASE_URL": "https://wandb.example.org"},
            {".netrc": NETRC.format("wandb.example.org")},
            True,
        ),
        ({"NETRC": "elsewhere"}, {"elsewhere": NETRC.format("api.wandb.ai")}, True),
    ],
)
def test_where_wandb_finds_a_login(
    environment: dict[str, str],
    files: dict[str, str],
    ready: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_CONFIG_DIR",
        "WANDB_DIR",
        "NETRC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    assert trackers.wandb_is_ready() is ready


def test_a_space_of_trackio_needs_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "get_token", lambda: None)
    trackers.check_trackers("sft", {"report_to": "trackio"})
    with pytest.raises(UserError, match="trackio_space_id needs a login to the hub; run: hf auth login"):
        trackers.check_trackers("sft", {"report_to": ["trackio"], "trackio_space_id": "me/space"})
