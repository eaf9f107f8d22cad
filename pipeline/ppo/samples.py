"""Sampled responses of a run's evaluations, as JSONL and in the trackers."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback

from pipeline.formatting.markdown import format_cell

MAX_SAMPLES = 40


def write_samples(trainer: Trainer, rows: list[dict[str, Any]]) -> None:
    """Write the first rows of an evaluation to `samples/step-N.jsonl`, and as a table to the trackers.

    The trackers are TensorBoard and Weights & Biases, if the trainer reports to them.
    """
    step, rows = trainer.state.global_step, rows[:MAX_SAMPLES]
    file = Path(str(trainer.args.output_dir)) / "samples" / f"step-{step:06}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in rows]
    temporary = file.with_name(f".{file.name}")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, file)  # a checkpoint may rely on the file that was there

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("samples", _markdown_table(rows), step)
        if isinstance(callback, WandbCallback):
            _log_to_wandb(rows)


def read_samples(work: Path) -> str:
    """Return the JSON lines of all evaluations, in order of steps."""
    return "".join(file.read_text(encoding="utf-8") for file in sorted(work.glob("samples/step-*.jsonl")))


def _log_to_wandb(rows: list[dict[str, Any]]) -> None:
    import wandb

    if wandb.run is not None:
        data = [list(map(str, row.values())) for row in rows]
        wandb.log({"samples": wandb.Table(columns=list(rows[0]), data=data)})


def _markdown_table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[format_cell(str(value)) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
