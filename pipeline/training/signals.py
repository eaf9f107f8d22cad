"""Ctrl-C and SIGTERM during training: save a checkpoint at the end of the step, and stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from pipeline.distributed.processes import is_main_process, world_size
from pipeline.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Stop training after a signal, with a checkpoint from which it resumes.

    PPO stops at the end of a rollout, because a rollout is sampled by the policy at its start. All processes
    stop at the same step, even if only one of them got the signal. A second signal stops at once.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.signal = 0  # number of the signal that this process got, or any process at the last step
        self.is_stopping = False
        self._first_at = 0.0

    @contextmanager
    def handlers(self) -> Iterator[None]:
        """Handle the signals in this block, in the main thread; a signal that is ignored stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.signal:
            # A launcher passes on to its processes what the terminal has already sent to them.
            if world_size() > 1 and now - self._first_at < 1:
                return
            raise Stopped(number)
        self.signal, self._first_at = number, now
        if is_main_process():
            unit = "rollout" if hasattr(self.trainer.args, "steps_per_rollout") else "step"
            name = signal.Signals(number).name
            line = f"  {name}: saving a checkpoint after this {unit}; a second signal stops at once\n"
            os.write(2, line.encode())  # `print` may be what was interrupted

    def agree(self) -> None:
        """Take note of a signal that another process got. All processes must call it."""
        if world_size() > 1:
            received = torch.tensor([self.signal], device=self.trainer.args.device)
            self.signal = int(self.trainer.accelerator.gather(received).max())

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Save if the run stops here; at the end of an epoch only after what else belongs to it."""
        self.agree()
        is_epoch_end = float(state.epoch).is_integer()
        self.is_stopping = bool(self.signal) and (is_epoch_end or not hasattr(args, "steps_per_rollout"))
        if self.is_stopping and not is_epoch_end:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Stop only now: an evaluation before may have stopped the run for good."""
        if self.is_stopping:
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Save at the end of an epoch; in the middle of one, do nothing that belongs to its end."""
        if not self.is_stopping:
            return
        if not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False
        elif not control.should_training_stop or control.should_log or control.should_evaluate:
            control.should_save = True
