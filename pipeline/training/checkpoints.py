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
    """Return the newest checkpoint that is complete and precedes the last step; delete newer ones.

    A checkpoint is complete if its last-written file parses. From a checkpoint of the last step, the Trainer
    would take another step, in the middle of an epoch.
    """
    checkpoints = sorted(
        work.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True
    )
    for folder in checkpoints:
        with suppress(OSError, ValueError):
            state = json.loads((folder / "trainer_state.json").read_text())
            if state["global_step"] < state["max_steps"]:
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


class RecordLaunch(TrainerCallback):
    """Write next to the first checkpoint how the run was started; `build_arguments` reads it on resume."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Write the launch file, unless it exists."""
        file = Path(str(args.output_dir)) / LAUNCH_FILE
        if state.is_world_process_zero and not file.exists():
            write_json(file, {"processes": args.world_size, "sharded_by": sharding_type(os.environ)})
