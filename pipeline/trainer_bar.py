"""The Trainer's progress bar."""

import time
from typing import Any

from transformers import ProgressCallback, Trainer

FIGURES = {"loss": "loss", "objective/raw_scores": "reward", "reward": "reward", "objective/kl": "kl", "kl": "kl"}  # of a log -> on the bar


class TrainerBar(ProgressCallback):
    """With the figures of the last log behind it, instead of lines between, and tokens per second."""

    _before: tuple[float, float] | None = None  # when a log came, the tokens by then

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is None or not logs:
            return
        shown = {name: f"{logs[key]:.3f}" for key, name in FIGURES.items() if key in logs}
        speed = logs.get("tokens_per_second")
        if "num_tokens" in logs:
            now = (time.perf_counter(), logs["num_tokens"])
            speed = (now[1] - self._before[1]) / (now[0] - self._before[0]) if self._before else None
            self._before = now
        if shown:
            self.training_bar.set_postfix(shown | ({} if speed is None else {"tokens/s": f"{speed:,.0f}"}))


def show_figures(trainer: Trainer) -> None:
    """Put this bar in the place of a trainer's own, where that has one."""
    if any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainerBar)
