"""Callbacks of every trainer: print progress, show it on the bar, and stop if a number is not finite."""

import math
import re
import time
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.errors import UserError

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

PROGRESS_LINES = 10  # of a training without a progress bar, at most

# What to do if a number is not finite.
REMEDY = "lower training.learning_rate, or set precision: fp32, and add --force to start over"


class PrintProgress(TrainerCallback):
    """Print a line per evaluation and per tenth of the training if no progress bar is shown."""

    def __init__(self) -> None:
        self._evaluated: tuple[int, str] | None = None  # step and text of the last evaluation
        self._tenths = 0.0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Count from the step that training begins or resumes at."""
        self._tenths = PROGRESS_LINES * state.global_step // max(state.max_steps, 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Print the first entry of each tenth of the steps."""
        tenths = PROGRESS_LINES * state.global_step // max(state.max_steps, 1)
        if "loss" in (logs or {}) and tenths > self._tenths:
            self._tenths = tenths
            _print_line(args, state, bar_metrics(logs or {}))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Print the metrics of an evaluation, without those of the launch. The last one may come twice."""
        shown = {
            name.removeprefix("eval_"): f"{value:.3f}"
            for name, value in (metrics or {}).items()
            if not LAUNCH_METRICS.search(name) and name != "epoch"
        }
        evaluated = (state.global_step, str(shown))
        if evaluated != self._evaluated:
            self._evaluated = evaluated
            _print_line(args, state, shown)


def bar_metrics(logs: dict[str, Any]) -> dict[str, str]:
    """Return by name the metrics of a log entry that stand for its progress, as text."""
    return {name: f"{logs[key]:.3f}" for key, name in BAR_METRICS.items() if key in logs}


def _print_line(args: TrainingArguments, state: Any, metrics: dict[str, str]) -> None:
    if args.disable_tqdm and state.is_world_process_zero:
        columns = "  ".join(f"{name} {value}" for name, value in metrics.items())
        print(f"  step {state.global_step}/{state.max_steps}  {columns}", flush=True)


class StopAtNonFinite(TrainerCallback):
    """Stop at the first gradient, loss or loss of an evaluation that is not finite. Raises `UserError`.

    The gradient is checked before the optimizer uses it. With fp16 it is not, because the loss scaler finds a
    scale by overflows; nor with DeepSpeed, which keeps it. The loss is then checked when it is logged.
    """

    def __init__(self, stage: str):
        self.stage = stage

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Let the Trainer log the loss as it is: it would replace what is not finite by a mean."""
        args.logging_nan_inf_filter = False

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradient. All ranks see the same one."""
        if not args.fp16 and not has_finite_gradient(kwargs["model"]):
            self._stop(state.global_step + 1, "the gradient is not finite")

    def on_log(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Check the losses of a log entry."""
        names = ["loss", "eval_loss"] if args.fp16 else ["loss", "grad_norm", "eval_loss"]
        for name in names:
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                self._stop(state.global_step, f"{name} is {value}, not finite")

    def _stop(self, step: int, problem: str) -> None:
        raise UserError(f"{self.stage}: step {step}: {problem}; nothing is published; {REMEDY}")


def has_finite_gradient(model: Any) -> bool:
    """Return whether the norm of the gradient is finite; true if there is no gradient."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())


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
        postfix = bar_metrics(logs)
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
