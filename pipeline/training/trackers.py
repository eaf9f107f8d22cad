"""Trackers (`training.report_to`): refuse those that could not report, and choose TensorBoard's folder.

The check comes before the long work. TensorBoard's events go to `runs/<run>/logs/<stage>/<time>/`, a folder
per training that outlives the work folder. TENSORBOARD_LOGGING_DIR names another one.
"""

import os
from configparser import ConfigParser
from configparser import Error as ConfigError
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import get_token
from transformers import Trainer
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from pipeline.artifacts.manifest import artifact_folder
from pipeline.config import nearest
from pipeline.distributed.processes import is_main_process
from pipeline.errors import UserError

# Name in transformers -> (module to import, distribution to install).
TRACKERS = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}

WANDB_SETTINGS = ("mode", "api_key", "identity_token_file", "base_url")


def check_trackers(stage: str, training: dict[str, Any]) -> None:
    """Check that each tracker is installed and logged in to, without importing it. Raises `UserError`."""
    report_to = training.get("report_to") or []
    names = [report_to] if isinstance(report_to, str) else report_to
    has_space = bool(training.get("trackio_space_id"))
    for name in filter(is_installed, TRACKERS) if "all" in names else names:
        prefix = f"{stage}: training.report_to={name}"
        if name == "none":
            continue
        if name not in TRACKERS:
            raise UserError(
                f"{prefix}: no such tracker{nearest(str(name), TRACKERS)}; expected all, none, "
                f"{', '.join(TRACKERS)}"
            )
        if not is_installed(name):
            raise UserError(
                f"{prefix}: not installed here; pip install {TRACKERS[name][1]}, or set "
                "training.report_to=none"
            )
        if name == "wandb" and is_main_process() and not wandb_is_ready():
            raise UserError(
                f"{prefix}: not logged in; run: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline"
            )
        if name == "trackio" and is_main_process() and has_space and not get_token():
            raise UserError(
                f"{prefix}: trackio_space_id needs a login to the hub; run: hf auth login, or remove it to "
                "log here"
            )


def is_installed(name: str) -> bool:
    """Return whether a tracker of `TRACKERS` is installed."""
    return find_spec(TRACKERS[name][0]) is not None


def wandb_is_ready() -> bool:
    """Return whether W&B will find a login, or is configured to send nothing.

    Reads its environment variables, its settings files and netrc.
    """
    settings = _read_wandb_settings()
    is_offline = settings.get("mode") in ("offline", "disabled", "dryrun")
    if is_offline or settings.get("api_key") or settings.get("identity_token_file"):
        return True
    host = urlsplit(settings.get("base_url", "https://api.wandb.ai")).netloc
    for file in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, NetrcParseError):
            return bool((netrc(Path(file).expanduser()).authenticators(host) or ("",))[-1])
    return False


def _read_wandb_settings() -> dict[str, str]:
    """Return W&B's settings; environment variables override its files."""
    parser = ConfigParser(interpolation=None)
    folders = (
        Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser(),
        Path(os.environ.get("WANDB_DIR", ""), "wandb"),
    )
    with suppress(ConfigError):
        parser.read(folder / "settings" for folder in folders)
    settings = dict(parser["default"]) if "default" in parser else {}
    for key in WANDB_SETTINGS:
        if value := os.environ.get(f"WANDB_{key.upper()}"):
            settings[key] = value
    return settings


def start_trackers(trainer: Trainer, work: Path, step: int) -> None:
    """Prepare the trackers before training resumes from `step`, or starts at 0.

    TensorBoard's events after that step belong to lost work; they are hidden.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and is_main_process():
            from torch.utils.tensorboard import SummaryWriter

            if not callback.logging_dir:
                callback.logging_dir = str(events_folder(artifact_folder(work), resume=step > 0))
            callback.tb_writer = SummaryWriter(callback.logging_dir, purge_step=step + 1 if step else None)
        if isinstance(callback, WandbCallback):
            import wandb

            # An earlier stage of this process leaves its run open, and this stage would write to it.
            if wandb.run is not None and wandb.run.config.get("output_dir", str(work)) != str(work):
                wandb.finish()


def end_trackers(trainer: Trainer) -> None:
    """Remove MLflow's callback after training.

    Its run has ended with training, and a later evaluation would open another one without a name.
    """
    trainer.remove_callback(MLflowCallback)


def events_folder(folder: Path, resume: bool) -> Path:
    """Return TensorBoard's folder for an artifact: the last one if training resumes, else a new one."""
    logs = folder.parent / "logs" / folder.name
    earlier = sorted(logs.glob("*"))
    return earlier[-1] if resume and earlier else logs / f"{datetime.now():%Y-%m-%dT%H-%M-%S}"
