"""Training with resume: the checkpoint to resume from, which checkpoints are kept, and the log.

A checkpoint counts if it is sealed (`pipeline.artifacts.seals`) and no file of it differs from its seal.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.artifacts.files import finite_or_none, read_json, write_json
from pipeline.artifacts.manifest import artifact_folder
from pipeline.artifacts.seals import (
    PREFIX,
    SEAL,
    delete_sealed,
    find_damage,
    list_checkpoints,
    seal_folder,
    sealed_steps,
)
from pipeline.distributed.launch import sharding_type
from pipeline.distributed.processes import is_main_process, on_main_process
from pipeline.distributed.sharding import disable_zero3_init
from pipeline.errors import Stopped, UserError
from pipeline.models.finite import find_nonfinite
from pipeline.training import trackers
from pipeline.training.callbacks import LAUNCH_METRICS, REMEDY, use_metrics_bar
from pipeline.training.signals import StopOnSignal

# In the work folder: the number of processes that started the run, and what sharded its weights.
LAUNCH_FILE = "begun.json"
# What a resumed run needs beside its checkpoint. A seal vouches for the other files of its folder.
BESIDE = (LAUNCH_FILE, "samples/*.jsonl", f"best/{SEAL}", f"policies/*/{SEAL}")


def train_with_resume(trainer: Trainer, work: Path) -> None:
    """Train from the last whole checkpoint in `work`, or from the beginning.

    Raises `Stopped` after a signal, `OSError` (ENOSPC) if a checkpoint could not be written because the disk
    is full, and `UserError` if weights are not finite, or if others can write to `work`.
    """
    # It prints every log entry as a dict; `PrintProgress` and log.jsonl already report them.
    trainer.remove_callback(PrinterCallback)
    checkpoint = on_main_process(lambda: last_checkpoint(work))
    stopper = StopOnSignal(trainer)
    trainer.add_callback(KeepCheckpoints(trainer, work))
    trainer.add_callback(stopper)
    use_metrics_bar(trainer)
    if checkpoint:
        trainer.args.eval_on_start = False  # it was done before the interruption
        trainer.add_callback(StopAtLastStep(trainer))
    trackers.start_trackers(trainer, work, int(checkpoint.name.removeprefix(PREFIX)) if checkpoint else 0)

    with stopper.handlers(), _explain_failures(trainer, work):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    trackers.end_trackers(trainer)
    disable_zero3_init(trainer.args)  # again, because initializing DeepSpeed enables it
    stopper.agree()
    if stopper.signal:
        raise Stopped(stopper.signal)


@contextmanager
def _explain_failures(trainer: Trainer, work: Path) -> Iterator[None]:
    """Raise what a `RuntimeError` of torch in this block is about, if its message tells."""
    try:
        yield
    except RuntimeError as error:
        # If the disk is full, `torch.save` only reports that its file is shorter than expected.
        if "inline_container" in str(error) and shutil.disk_usage(work).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work)) from error
        if "probability tensor contains" in str(error):  # from TRL's trainers, which sample with `generate`
            stage, step = artifact_folder(work).name, trainer.state.global_step
            problem = "the probabilities of tokens are not finite; nothing is published"
            raise UserError(f"{stage}: step {step}: {problem}; {REMEDY}") from error
        raise


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest whole checkpoint, and print the reason for each newer one, which is deleted.

    One of the last step has all that was learned: it is there if the run failed later, while it evaluated or
    saved. Without any checkpoint, policies and samples of the interrupted run are deleted. Raises `UserError`
    if others could have changed the checkpoints, and `OSError` if one cannot be read.
    """
    checkpoints = list_checkpoints(work)
    if checkpoints:
        check_owner(work)
    problems: list[str] = []
    for step, folder in reversed(checkpoints.items()):
        damage = find_damage(folder)
        if damage is None:
            _print_damaged(problems, f"resuming from step {step}")
            return folder
        delete_sealed(folder)
        problems.append(f"{folder.name}: {damage}")
    _print_damaged(problems, "training begins anew")
    for name in ("samples", "best", "policies"):
        shutil.rmtree(work / name, ignore_errors=True)
    return None


def check_owner(work: Path) -> None:
    """Raise `UserError` if another user could have written a checkpoint: resuming reads pickles.

    A folder without rights for others, as a stage makes it, protects all that is in it.
    """
    if os.name != "posix":
        return
    is_private = not work.stat().st_mode & 0o077
    for path in [work] if is_private else [work, *work.rglob("*")]:
        status, user = path.lstat(), os.geteuid()
        if status.st_uid != user:
            problem = f"belongs to user {status.st_uid}, and this process runs as user {user}"
            raise UserError(
                f"{path}: {problem}; resuming would run code from its pickles; resume as its owner, or add "
                "--force to start over"
            )
        if status.st_mode & 0o022:
            raise UserError(
                f"{path}: other users can write to it (mode {status.st_mode & 0o777:o}), and resuming would "
                f"run code from its pickles; if nobody did, run: chmod -R go-w {work}, or add --force to "
                "start over"
            )


def read_launch(work: Path) -> dict[str, Any]:
    """Return `processes` and `sharded_by` of the launch that started the run, or {} if they are not known."""
    launch = read_json(work / LAUNCH_FILE)
    is_valid = type(launch.get("processes")) is int and launch["processes"] > 0
    return launch if is_valid and isinstance(launch.get("sharded_by"), str) else {}


def write_log(trainer: Trainer, output: Path) -> None:
    """Write the trainer's log entries to log.jsonl, without the metrics that differ from launch to launch.

    A metric that is not finite, as in a step that PPO skipped, is null.
    """
    entries = [
        {name: value for name, value in entry.items() if not LAUNCH_METRICS.search(name)}
        for entry in trainer.state.log_history
    ]
    lines = [json.dumps(finite_or_none(entry), sort_keys=True, allow_nan=False) + "\n" for entry in entries]
    (output / "log.jsonl").write_text("".join(lines))


def _print_damaged(problems: list[str], outcome: str) -> None:
    if problems:
        print(f"  deleted {'; '.join(problems)}; {outcome}", flush=True)


class KeepCheckpoints(TrainerCallback):
    """Seal each new checkpoint, and then delete the oldest beyond `save_total_limit`, by their steps.

    The Trainer itself would delete by the time of the last change, and count checkpoints that are not whole.
    """

    def __init__(self, trainer: Trainer, work: Path):
        self.trainer = trainer
        self.work = work
        self.limit = trainer.args.save_total_limit
        trainer.args.save_total_limit = None

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint. Raises `UserError` instead if a weight is not finite."""
        if weight := find_nonfinite(kwargs["model"]):
            raise UserError(
                f"{artifact_folder(self.work).name}: step {state.global_step}: the weight {weight} is not "
                f"finite; the checkpoint of this step does not count; {REMEDY}"
            )
        self.trainer.accelerator.wait_for_everyone()  # the files of all processes are there
        if is_main_process():
            if not read_launch(self.work):
                launch = {"processes": args.world_size, "sharded_by": sharding_type(os.environ)}
                write_json(self.work / LAUNCH_FILE, launch)
            beside = [file for pattern in BESIDE for file in sorted(self.work.glob(pattern))]
            seal_folder(self.work / f"{PREFIX}{state.global_step}", state.global_step, beside)
            best = state.best_model_checkpoint if args.load_best_model_at_end else None
            rotate_checkpoints(self.work, self.limit, Path(best).name if best else None)


def rotate_checkpoints(work: Path, limit: int | None, best: str | None = None) -> None:
    """Keep the newest whole checkpoint, the one named `best`, and the newest others up to `limit` in all."""
    steps = sealed_steps(work)
    if not limit or limit < 0 or not steps:
        return
    kept = {steps[-1], *(step for step in steps if f"{PREFIX}{step}" == best)}
    for step in reversed(steps):
        if len(kept) < limit:
            kept.add(step)
    for step, folder in list_checkpoints(work).items():
        if step not in kept:
            delete_sealed(folder)


class StopAtLastStep(TrainerCallback):
    """Take no further step if training resumes from a checkpoint of the last step.

    In the middle of an epoch the Trainer would take one before it looks at the number of steps.
    """

    def __init__(self, trainer: Trainer):
        self.trainer: Any = trainer
        self.is_done = False

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Let the Trainer find no more batches if all steps have been taken."""
        self.is_done = state.global_step >= state.max_steps
        if self.is_done:
            control.should_training_stop = True
            self.trainer.get_batch_samples = lambda *_: ([], None)

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Skip what was done before the interruption."""
        if self.is_done:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Remove the mean loss over no steps."""
        if self.is_done:
            state.log_history[-1].pop("train_loss", None)
