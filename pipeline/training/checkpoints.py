"""Training with resume: the checkpoint that counts, how a run was launched, and its log."""

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

LAUNCH_FILE = (
    "begun.json"  # in the work folder: by how many processes the run was begun, and what shards its weights
)


def train_with_resume(trainer: Trainer, work: Path) -> None:
    """Train, going on from the last checkpoint that counts."""
    trainer.remove_callback(PrinterCallback)  # dicts of every log entry; `Say` and log.jsonl hold them
    checkpoint = broadcast(last_checkpoint(work) if is_main_process() else None)
    trainer.add_callback(RecordLaunch)
    use_metrics_bar(trainer)
    if checkpoint:
        trainer.args.eval_on_start = False  # that was done
    trackers.start_trackers(trainer, work, int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        # `torch.save` does not say that the disk is full, only that its file is shorter than it should be.
        if "inline_container" in str(error) and shutil.disk_usage(work).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work)) from error
        raise
    trackers.end_trackers(trainer)
    disable_zero3_init(trainer.args)  # again: DeepSpeed's start has set it back


def last_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint whose last-written file parses, from before the last step; newer ones are removed.

    From a checkpoint of the last step the Trainer would take one step more, in the middle of an epoch.
    """
    found = sorted(
        work.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True
    )
    for folder in found:
        with suppress(OSError, ValueError):
            state = json.loads((folder / "trainer_state.json").read_text())
            if state["global_step"] < state["max_steps"]:
                return folder
        shutil.rmtree(folder)
    return None


def write_log(trainer: Trainer, output: Path) -> None:
    """The trainer's log entries as JSON lines, without what differs from run to run."""
    entries = [
        {k: v for k, v in entry.items() if not LAUNCH_METRICS.search(k)}
        for entry in trainer.state.log_history
    ]
    (output / "log.jsonl").write_text("".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries))


class RecordLaunch(TrainerCallback):
    """Writes beside the first checkpoint how the run was begun; see `_shares`."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        file = Path(str(args.output_dir)) / LAUNCH_FILE
        if state.is_world_process_zero and not file.exists():
            write_json(file, {"processes": args.world_size, "sharded_by": sharding_type(os.environ)})
