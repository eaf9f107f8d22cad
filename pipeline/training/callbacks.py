"""Callbacks of every trainer: print a line per evaluation, and show metrics on the progress bar."""

import re
import time
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

# Metrics of one launch; an interrupted run has several launches.
LAUNCH_METRICS = re.compile("runtime|per_second|^time/|num_tokens")

# Key in a log entry -> name on the progress bar.
BAR_METRICS = {
    "loss": "loss",
    "objective/raw_scores": "reward",
    "reward": "reward",
    "objective/kl": "kl",
    "kl": "kl",
}


class PrintEvaluations(TrainerCallback):
    """Print one line per evaluation if no progress bar is shown."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Print the metrics of an evaluation, without those of the launch."""
        if not args.disable_tqdm or not state.is_world_process_zero:
            return
        columns = [
            f"{name.removeprefix('eval_')} {value:.3f}"
            for name, value in (metrics or {}).items()
            if not LAUNCH_METRICS.search(name) and name != "epoch"
        ]
        print(f"  step {state.global_step}/{state.max_steps}  " + "  ".join(columns), flush=True)


class MetricsProgressBar(ProgressCallback):
    """A progress bar with the metrics of the last log entry, and tokens per second.

    They replace the lines that the Trainer prints.
    """

    _last_count: tuple[float, float] | None = None  # time of the last log entry, and tokens until then

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the metrics of a log entry."""
        if self.training_bar is None or not logs:
            return
        postfix = {name: f"{logs[key]:.3f}" for key, name in BAR_METRICS.items() if key in logs}
        speed = logs.get("tokens_per_second")
        if "num_tokens" in logs:
            now, tokens = time.perf_counter(), logs["num_tokens"]
            speed = None
            if self._last_count:
                last_time, last_tokens = self._last_count
                speed = (tokens - last_tokens) / (now - last_time)
            self._last_count = now, tokens
        if postfix:
            self.training_bar.set_postfix(postfix | ({} if speed is None else {"tokens/s": f"{speed:,.0f}"}))


def use_metrics_bar(trainer: Trainer) -> None:
    """Replace a trainer's own progress bar, if it has one, by `MetricsProgressBar`."""
    if any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(MetricsProgressBar)
