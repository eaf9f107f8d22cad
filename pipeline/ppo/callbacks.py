"""What stops a run before it is lost: gradients that are not finite, a policy too far from its reference, a peak that is passed."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.errors import UserError
from pipeline.ppo.policy_trainer import BEST_STEP, POLICIES
from pipeline.ppo.rollout import Rollout

MOST_SKIPPED = 3
Minibatch = tuple[Rollout, list[int]]  # a rollout, and the rows of it that are trained on


class SkipNonFinite(TrainerCallback):
    """A step whose gradient is not finite is left out, its minibatch written to `skipped-STEP.jsonl`; after three in a row the run stops.

    Non-finite losses come with non-finite gradients. All ranks see the same gradient, so that they decide alike.
    """

    def __init__(self, minibatch: Callable[[], Minibatch]):
        self.minibatch, self.in_a_row = minibatch, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            self.in_a_row = 0
            return
        model.zero_grad(set_to_none=True)  # the optimizer then passes these parameters by
        self.in_a_row += 1
        file = Path(args.output_dir) / f"skipped-{state.global_step}.jsonl"
        if state.is_world_process_zero:
            file.write_text(
                "".join(json.dumps(row) + "\n" for row in _describe_rows(*self.minibatch())), encoding="utf-8"
            )
            print(
                f"  step {state.global_step}: the gradient is not finite; the step is left out, its minibatch is in {file}",
                flush=True,
            )
        if self.in_a_row == MOST_SKIPPED:
            raise UserError(
                f"ppo: the gradient was not finite in {MOST_SKIPPED} steps in a row (see {file}); the last checkpoint is kept; "
                "lower training.learning_rate, or set precision: fp32"
            )


class EarlyStopping(TrainerCallback):
    """Stops the run after `patience` evaluations in a row without a new best; None never stops.

    Told by the Trainer's own state alone. The checkpoint of that step is not written: a run resumed from there would go on.
    """

    def __init__(self, patience: int | None):
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = state.best_global_step or 0
        since = {
            entry["step"] for entry in state.log_history if "eval_reward" in entry and entry["step"] > best
        }
        late = self.patience is not None and len(since) >= self.patience
        if late and state.global_step < state.max_steps and not control.should_training_stop:
            control.should_training_stop, control.should_save = True, False
            if state.is_world_process_zero:
                print(
                    f"  step {state.global_step}: stopped; the best is of step {state.best_global_step}, in best/",
                    flush=True,
                )


def _describe_rows(rollout: Rollout, rows: list[int]) -> Iterator[dict[str, Any]]:
    answers = rollout.responses
    for row in rows:
        real = rollout.mask[row]
        yield {
            "query_ids": answers.query_ids[row][answers.query_mask[row].bool()].tolist(),
            "response_ids": answers.response_ids[row][real].tolist(),
            "answer": answers.texts[row],
            "score": float(rollout.scores[row]),
            **{
                name: getattr(rollout, name)[row][real].tolist()
                for name in ("logprobs", "values", "advantages", "returns")
            },
        }


def check_kl(kl: float, limit: float | None, rollout: int, work: str) -> None:
    """Raises `UserError` where the mean KL of a rollout's answers to the reference is above the limit, or is no number."""
    if limit is not None and not kl <= limit:
        raise UserError(
            f"ppo: rollout {rollout}: KL to the reference is {kl:.4g} nats per answer, above training.max_kl={limit:g}; "
            f"the last checkpoints are kept in {work}; raise training.kl_coef, lower training.learning_rate, or raise training.max_kl"
        )


class DropStaleCheckpoints(TrainerCallback):
    """A run that goes on from a checkpoint draws other samples than the one that died: what that one left behind of later steps goes, and
    where `best/` is of such a step, the best is found anew."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:
            return
        work, best = Path(str(args.output_dir)), 0
        if is_main_process():
            for left in (*work.glob(f"{POLICIES}/step-*"), *work.glob("samples/step-*")):
                if int(left.stem.removeprefix("step-")) > state.global_step:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            best = int((work / BEST_STEP).read_text()) if (work / BEST_STEP).is_file() else 0
        if broadcast(best) > state.global_step:  # on all ranks, which stop by it together
            state.best_metric = state.best_global_step = None
