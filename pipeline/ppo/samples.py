"""Sample answers of a run while it goes on, as JSONL and in the trackers."""

import json
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback

from pipeline.formatting.markdown import format_cell

MOST_SAMPLES = 40


def write_samples(trainer: Trainer, rows: list[dict[str, Any]]) -> None:
    """The sample answers of an evaluation: `samples/step-N.jsonl`, and a table in TensorBoard and Weights & Biases."""
    step, kept = trainer.state.global_step, rows[:MOST_SAMPLES]
    file = Path(str(trainer.args.output_dir)) / "samples" / f"step-{step:06}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8"
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("samples", _markdown_table(kept), step)
        if isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                wandb.log(
                    {
                        "samples": wandb.Table(
                            columns=list(kept[0]), data=[list(map(str, row.values())) for row in kept]
                        )
                    }
                )


def read_samples(work: Path) -> str:
    """The samples of all evaluations, in order of steps."""
    return "".join(file.read_text(encoding="utf-8") for file in sorted(work.glob("samples/step-*.jsonl")))


def _markdown_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([format_cell(str(value)) for value in row.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
