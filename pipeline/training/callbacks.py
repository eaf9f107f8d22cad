"""Callbacks of every trainer: a line per evaluation, and metrics on the progress bar."""

import re
import time
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

LAUNCH_METRICS = re.compile(
    "runtime|per_second|^time/|num_tokens"
)  # figures of one launch, which an interrupted run has several of


class PrintEvaluations(TrainerCallback):
    """One line per evaluation where no progress bar is shown."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if args.disable_tqdm and state.is_world_process_zero:
            shown = {
                k.removeprefix("eval_"): f"{v:.3f}"
                for k, v in (metrics or {}).items()
                if not LAUNCH_METRICS.search(k) and k != "epoch"
            }
            print(
                f"  step {state.global_step}/{state.max_steps}  "
                + "  ".join(f"{k} {v}" for k, v in shown.items()),
                flush=True,
            )


BAR_METRICS = {
    "loss": "loss",
    "objective/raw_scores": "reward",
    "reward": "reward",
    "objective/kl": "kl",
    "kl": "kl",
}  # of a log -> on the bar


class MetricsProgressBar(ProgressCallback):
    """With the figures of the last log behind it, instead of lines between, and tokens per second."""

    _before: tuple[float, float] | None = None  # when a log came, the tokens by then

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.training_bar is None or not logs:
            return
        shown = {name: f"{logs[key]:.3f}" for key, name in BAR_METRICS.items() if key in logs}
        speed = logs.get("tokens_per_second")
        if "num_tokens" in logs:
            now = (time.perf_counter(), logs["num_tokens"])
            speed = (now[1] - self._before[1]) / (now[0] - self._before[0]) if self._before else None
            self._before = now
        if shown:
            self.training_bar.set_postfix(shown | ({} if speed is None else {"tokens/s": f"{speed:,.0f}"}))


def use_metrics_bar(trainer: Trainer) -> None:
    """Put this bar in the place of a trainer's own, where that has one."""
    if any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(MetricsProgressBar)
