"""Training with resume: the checkpoint to resume from, a record of the launch, and the log."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.artifacts.files import write_json
from pipeline.distributed.launch import sharding_type
from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.distributed.sharding import disable_zero3_init
from pipeline.training import trackers
from pipeline.training.callbacks import LAUNCH_METRICS, use_metrics_bar

# In the work folder: the number of processes that started the run, and what sharded its weights.
LAUNCH_FILE = "begun.json"


def train_with_resume(trainer: Trainer, work: Path) -> None:
    """Train from the last usable checkpoint in `work`, or from the beginning.

    Raises `OSError` (ENOSPC) if a checkpoint could not be written because the disk is full.
    """
    # It prints every log entry as a dict; `PrintEvaluations` and log.jsonl already report them.
    trainer.remove_callback(PrinterCallback)
    checkpoint = broadcast(last_checkpoint(work) if is_main_process() else None)
    trainer.add_callback(RecordLaunch)
    use_metrics_bar(trainer)
    if checkpoint:
        trainer.args.eval_on_start = False  # it was done before the interruption
        trainer.add_callback(StopAtLastStep(trainer))
    trackers.start_trackers(trainer, work, int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0)

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        # If the disk is full, `torch.save` only reports that its file is shorter than expected.
        if "inline_container" in str(error) and shutil.disk_usage(work).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work)) from error
        raise

    trackers.end_trackers(trainer)
    disable_zero3_init(trainer.args)  # again, because initializing DeepSpeed enables it


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest checkpoint that is complete; delete newer ones.

    A checkpoint is complete if its last-written file parses. One of the last step has all that was learned:
    it is there if the run failed later, while it evaluated or saved.
    """
    checkpoints = sorted(
        work.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True
    )
    for folder in checkpoints:
        with suppress(OSError, ValueError):
            json.loads((folder / "trainer_state.json").read_text())
            return folder
        shutil.rmtree(folder)
    return None


def write_log(trainer: Trainer, output: Path) -> None:
    """Write the trainer's log entries to log.jsonl, without the metrics that differ from launch to launch."""
    entries = [
        {name: value for name, value in entry.items() if not LAUNCH_METRICS.search(name)}
        for entry in trainer.state.log_history
    ]
    (output / "log.jsonl").write_text("".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries))


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


class RecordLaunch(TrainerCallback):
    """Write next to the first checkpoint how the run was started; `build_arguments` reads it on resume."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Write the launch file, unless it exists."""
        file = Path(str(args.output_dir)) / LAUNCH_FILE
        if state.is_world_process_zero and not file.exists():
            write_json(file, {"processes": args.world_size, "sharded_by": sharding_type(os.environ)})
