import math
import statistics
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from pipeline.models.generation import Responses
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.policy_trainer import EVALUATION, PolicyTrainer


def evaluate_responses(trainer: PolicyTrainer, data: Dataset) -> list[dict[str, Any]]:
    """`drawing.samples` rows for each prompt of `data`: prompt, answer, the rewards there are, KL, response tokens, whether it ended. The
    prompts are shared out over the ranks."""
    args, drawing, table = trainer.args, trainer.drawing, []
    scorers = {"reward": trainer.reward.score, "scorer_reward": trainer.scorer, "gold_reward": trainer.gold}
    total = len(data) * drawing.samples
    # As many for each rank, who may share a reference: some are drawn twice.
    mine = range(args.process_index, math.ceil(total / args.world_size) * args.world_size, args.world_size)
    for start in range(0, len(mine), args.per_device_eval_batch_size):
        numbers = list(mine[start : start + args.per_device_eval_batch_size])
        rows = [number % len(data) for number in numbers]
        answers = trainer.answer(data, rows, EVALUATION, numbers)
        columns = {"prompt": data[rows]["prompt"], "answer": answers.texts}
        columns |= {name: trainer.call(scorer, answers, data, rows) for name, scorer in scorers.items() if scorer is not None}
        with trainer.accelerator.autocast():
            columns["kl"] = kl_to_reference(trainer.actor, answers, drawing.options["temperature"])
        columns |= {"response_tokens": answers.response_mask.sum(1).tolist(), "ended_fraction": list(map(float, answers.ended))}
        columns["number"] = numbers
        table += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    table = sorted(gather_object(table), key=lambda row: row["number"])[:total]
    return [{name: value for name, value in row.items() if name != "number"} for row in table]


@torch.no_grad()  # not inference_mode, in which sharded weights would be gathered into tensors that training cannot fill again
def kl_to_reference(actor: ActorCritic, answers: Responses, temperature: float) -> list[float]:
    """log p − log q summed over each answer (k1): an unbiased sample of the KL of whole answers, in nats."""
    tensors = (answers.query_ids, answers.query_mask, answers.response_ids, answers.response_mask)
    logprobs = actor(*tensors, temperature).logprobs
    return (logprobs - actor.reference_logprobs(*tensors, temperature)).sum(1).tolist()


def warn_overoptimization(trainer: PolicyTrainer, table: list[dict[str, Any]], judge: str) -> None:
    """Says that the reward has risen since the best evaluation of the `judge`, which has fallen by more than two standard errors: the
    policy then exploits the reward."""
    history = [entry for entry in trainer.state.log_history if f"eval_{judge}" in entry]
    if judge == "reward" or not history or len(table) < 2 or not trainer.args.should_save:
        return
    best, now = (max(history, key=lambda entry: entry[f"eval_{judge}"]), history[-1])
    error = statistics.stdev(row[judge] for row in table) / len(table) ** 0.5
    if now["eval_reward"] > best["eval_reward"] and best[f"eval_{judge}"] - now[f"eval_{judge}"] > 2 * error:
        moves = [f"{best[f'eval_{name}']:.3f} to {now[f'eval_{name}']:.3f}" for name in ("reward", judge)]
        print(
            f"  step {now['step']}: since step {best['step']} the reward rose from {moves[0]} and the {judge.replace('_', ' ')} fell from "
            f"{moves[1]}, at a KL of {now['eval_kl']:.2f}: the policy exploits the reward model",
            flush=True,
        )
