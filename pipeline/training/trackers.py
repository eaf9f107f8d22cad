"""Trackers (`training.report_to`): refused before the long work where they could not report, and given a place that outlives the work.

TensorBoard's events go to `runs/<run>/logs/<stage>/<time>/`, a folder for each training; TENSORBOARD_LOGGING_DIR names another place.
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

# as transformers spells them -> what is imported, what is installed
TRACKERS = {
    "azure_ml": ("azureml", "azureml-sdk"), "clearml": ("clearml", "clearml"), "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"), "dagshub": ("dagshub", "dagshub"), "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"), "mlflow": ("mlflow", "mlflow"), "neptune": ("neptune", "neptune"), "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"), "trackio": ("trackio", "trackio"), "wandb": ("wandb", "wandb"),
}  # fmt: skip


def check_trackers(stage: str, training: dict[str, Any]) -> None:
    """Refuse a tracker that is not installed, or not logged in to; none is imported. Raises `UserError`."""
    given = training.get("report_to") or []
    names = [given] if isinstance(given, str) else given
    for name in filter(is_installed, TRACKERS) if "all" in names else names:
        where = f"{stage}: training.report_to={name}"
        if name != "none" and name not in TRACKERS:
            raise UserError(
                f"{where}: no such tracker{nearest(str(name), TRACKERS)}; there are all, none, {', '.join(TRACKERS)}"
            )
        if name != "none" and not is_installed(name):
            raise UserError(
                f"{where}: not installed here; pip install {TRACKERS[name][1]}, or set training.report_to=none"
            )
        if name == "wandb" and is_main_process() and not wandb_is_ready():
            raise UserError(
                f"{where}: not logged in; run: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline"
            )
        if name == "trackio" and is_main_process() and training.get("trackio_space_id") and not get_token():
            raise UserError(
                f"{where}: trackio_space_id needs a login to the hub; run: hf auth login, or remove it to log here"
            )


def is_installed(name: str) -> bool:
    return find_spec(TRACKERS[name][0]) is not None


def wandb_is_ready() -> bool:
    """Whether W&B will find a key, or is told to send nothing: in its environment variables, its settings files, or netrc."""
    settings = ConfigParser(interpolation=None)
    folders = (
        Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser(),
        Path(os.environ.get("WANDB_DIR", ""), "wandb"),
    )
    with suppress(ConfigError):
        settings.read(folder / "settings" for folder in folders)
    found = dict(settings["default"]) if "default" in settings else {}
    found |= {key: os.environ[f"WANDB_{key.upper()}"] for key in ("mode", "api_key", "identity_token_file", "base_url")
              if os.environ.get(f"WANDB_{key.upper()}")}  # fmt: skip
    if (
        found.get("mode") in ("offline", "disabled", "dryrun")
        or found.get("api_key")
        or found.get("identity_token_file")
    ):
        return True
    host = urlsplit(found.get("base_url", "https://api.wandb.ai")).netloc
    for file in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, NetrcParseError):
            return bool((netrc(Path(file).expanduser()).authenticators(host) or ("",))[-1])
    return False


def start_trackers(trainer: Trainer, work: Path, step: int) -> None:
    """Before training goes on from `step`: what comes after it in TensorBoard's events was lost, and is hidden there."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and is_main_process():
            from torch.utils.tensorboard import SummaryWriter

            callback.logging_dir = callback.logging_dir or str(
                events_folder(artifact_folder(work), resume=step > 0)
            )
            callback.tb_writer = SummaryWriter(callback.logging_dir, purge_step=step + 1 if step else None)
        if isinstance(callback, WandbCallback):
            import wandb

            # An earlier stage of this process leaves its run open, into which this one would write
            if wandb.run is not None and wandb.run.config.get("output_dir", str(work)) != str(work):
                wandb.finish()


def end_trackers(trainer: Trainer) -> None:
    """After training: MLflow's run ends with it, and a later evaluation would open another one without a name."""
    trainer.remove_callback(MLflowCallback)


def events_folder(folder: Path, resume: bool) -> Path:
    """That of the training that goes on, else a new one."""
    logs = folder.parent / "logs" / folder.name
    earlier = sorted(logs.glob("*"))
    return earlier[-1] if resume and earlier else logs / f"{datetime.now():%Y-%m-%dT%H-%M-%S}"
