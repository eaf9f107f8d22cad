"""Sampled responses of a run's evaluations, as JSONL and in the trackers.

A row of the JSONL has the prompt, the response (`answer`), its metrics, and lists with one item per token:

- `tokens`: the texts of the tokens, which join to `answer`; that of an end token, which `answer` does not
  contain, is empty.
- `token_rewards`: the rewards as the reward function returned them; a number for the whole response is on the
  last token, and the others are 0.
- `token_values`: the critic's values of the states in which the tokens were chosen, to 6 digits. Only PPO's
  rows have them.

The first `MAX_SAMPLES` rows are kept. A response whose tokens do not decode to its text has no such lists.
"""

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback

from pipeline.errors import UserError
from pipeline.formatting.markdown import format_cell
from pipeline.reward.token_rewards import spread_reward, token_ends

MAX_SAMPLES = 40
TOKEN_COLUMNS = ("tokens", "token_rewards", "token_values")


def token_columns(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    text: str,
    reward: float | list[float],
    values: Sequence[float] | None,
) -> dict[str, Any]:
    """Return the lists of a row, with one item per token of a response.

    `values` is None without a critic. There are no lists if `ids` do not decode to `text`.
    """
    try:
        ends = token_ends(tokenizer, ids, text)
    except UserError:
        return {}
    columns: dict[str, Any] = {
        "tokens": [text[start:end] for start, end in pairwise([0, *ends])],
        "token_rewards": spread_reward(reward, len(ids)),
    }
    return columns if values is None else columns | {"token_values": [float(f"{v:.6g}") for v in values]}


def write_samples(trainer: Trainer, rows: list[dict[str, Any]]) -> None:
    """Write the first rows of an evaluation to `samples/step-N.jsonl`, and as a table to the trackers.

    The table is without the lists per token. The trackers are TensorBoard and Weights & Biases, if the
    trainer reports to them.
    """
    step, rows = trainer.state.global_step, rows[:MAX_SAMPLES]
    file = Path(str(trainer.args.output_dir)) / "samples" / f"step-{step:06}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in rows]
    temporary = file.with_name(f".{file.name}")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, file)  # a checkpoint may rely on the file that was there

    rows = [{name: row[name] for name in row if name not in TOKEN_COLUMNS} for row in rows]
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
