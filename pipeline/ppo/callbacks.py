"""Callbacks of policy trainers: skipped steps, early stopping, stale files; and checks of a rollout."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.artifacts.files import finite_or_none
from pipeline.artifacts.seals import read_seal
from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.errors import UserError
from pipeline.ppo.policy_trainer import POLICIES
from pipeline.ppo.rollout import Rollout
from pipeline.training.callbacks import REMEDY, has_finite_gradient

MAX_SKIPPED_STEPS = 3
Minibatch = tuple[Rollout, list[int]]  # a rollout, and the rows of it that are trained on


class SkipNonFinite(TrainerCallback):
    """Skip a step whose gradient is not finite, and stop the run after three such steps in a row.

    The minibatch is written to `skipped-STEP.jsonl`. A non-finite loss comes with a non-finite gradient. All
    ranks see the same gradient, so they decide alike.
    """

    def __init__(self, minibatch: Callable[[], Minibatch]):
        self.minibatch = minibatch
        self.skipped_in_a_row = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradient. Raises `UserError` after `MAX_SKIPPED_STEPS` skipped steps in a row."""
        model: nn.Module = kwargs["model"]
        if has_finite_gradient(model):
            self.skipped_in_a_row = 0
            return

        model.zero_grad(set_to_none=True)  # the optimizer skips parameters without a gradient
        self.skipped_in_a_row += 1
        file = Path(str(args.output_dir)) / f"skipped-{state.global_step}.jsonl"
        if state.is_world_process_zero:
            lines = [json.dumps(finite_or_none(row)) + "\n" for row in _describe_rows(*self.minibatch())]
            file.write_text("".join(lines), encoding="utf-8")
            print(
                f"  step {state.global_step}: the gradient is not finite; the step is skipped, "
                f"its minibatch is in {file}",
                flush=True,
            )
        if self.skipped_in_a_row == MAX_SKIPPED_STEPS:
            raise UserError(
                f"ppo: the gradient was not finite in {MAX_SKIPPED_STEPS} steps in a row (see {file}); "
                f"the last checkpoint is kept; {REMEDY}"
            )


class EarlyStopping(TrainerCallback):
    """Stop the run after `patience` evaluations in a row without a new best; None never stops.

    The decision depends on the Trainer's state alone. No checkpoint of that step is written, because a run
    that resumed from it would continue.
    """

    def __init__(self, patience: int | None):
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the evaluations since the best one."""
        best = state.best_global_step or 0
        evaluated = {entry["step"] for entry in state.log_history if "eval_reward" in entry}
        since_best = {step for step in evaluated if step > best}
        is_late = self.patience is not None and len(since_best) >= self.patience
        if not is_late or state.global_step >= state.max_steps or control.should_training_stop:
            return

        control.should_training_stop, control.should_save = True, False
        if state.is_world_process_zero:
            step, best_step = state.global_step, state.best_global_step
            print(f"  step {step}: stopped; the best is of step {best_step}, in best/", flush=True)


class DropStaleCheckpoints(TrainerCallback):
    """After a resume, delete policies and samples of later steps than the checkpoint.

    The resumed run samples other responses than the interrupted one, so its later steps differ. If `best/` is
    of such a step, the best is reset.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Delete what is stale; all ranks reset the best together, because they stop by it."""
        if not state.global_step:
            return
        work, best_step = Path(str(args.output_dir)), 0
        if is_main_process():
            for path in (*work.glob(f"{POLICIES}/step-*"), *work.glob("samples/step-*")):
                if int(path.stem.removeprefix("step-")) > state.global_step:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            best_step = read_seal(work / "best").get("step", 0)
        if broadcast(best_step) > state.global_step:
            state.best_metric = state.best_global_step = None


def check_kl(kl: float, limit: float | None, rollout: int, work: str) -> None:
    """Raise `UserError` if a rollout's mean KL to the reference is above the limit, or not finite."""
    if not math.isfinite(kl):
        raise UserError(
            f"ppo: rollout {rollout}: KL to the reference is {kl}, not finite; "
            f"the last checkpoints are kept in {work}; {REMEDY}"
        )
    if limit is not None and kl > limit:
        raise UserError(
            f"ppo: rollout {rollout}: KL to the reference is {kl:.4g} nats per response, "
            f"above training.max_kl={limit:g}; the last checkpoints are kept in {work}; "
            "raise training.kl_coef, lower training.learning_rate, or raise training.max_kl"
        )


def _describe_rows(rollout: Rollout, rows: list[int]) -> Iterator[dict[str, Any]]:
    responses = rollout.responses
    tensors = {"token_scores": rollout.token_scores} | rollout.trained_on()
    for row in rows:
        real = rollout.mask[row]
        yield {
            "query_ids": responses.query_ids[row][responses.query_mask[row].bool()].tolist(),
            "response_ids": responses.response_ids[row][real].tolist(),
            "answer": responses.texts[row],
            "score": float(rollout.scores[row]),
            **{name: tensor[row][real].tolist() for name, tensor in tensors.items()},
        }


def check_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> None:
    """Raise `UserError` if the ratio of a rollout's first minibatch is not 1. All arguments are (B, T).

    The model is then random, or depends on its mode.
    """
    error = float(torch.where(mask, logprobs.detach() - old_logprobs, 0.0).abs().max())
    if error != 0.0 and math.isfinite(error):  # `SkipNonFinite` handles a ratio that is not finite
        raise UserError(
            f"ppo: on a rollout's first minibatch the log-probabilities differ by up to {error:.2g} from "
            "those just computed; expected equal ones: something in the model is random or depends on "
            "the mode (dropout, a router's jitter, a patched forward); switch it off in its config"
        )
