"""Parts of a policy's evaluation: rows shared over ranks, KL and values, over-optimization warning."""

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments

from pipeline.data.identity import number_questions
from pipeline.models.generation import Responses
from pipeline.models.logprobs import rows_within_budget
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.functional import sequence_kl

Row = dict[str, Any]


def share_rows(evaluate: Callable[[list[int]], list[Row]], total: int, args: TrainingArguments) -> list[Row]:
    """Return the rows of all numbers below `total`, in order; each rank evaluates its share, in batches.

    Every rank evaluates the same number of rows, since sharded forwards wait for each other: a few surplus
    rows are evaluated and dropped.
    """
    padded_total = math.ceil(total / args.world_size) * args.world_size
    share = range(args.process_index, padded_total, args.world_size)
    table: list[tuple[int, Row]] = []
    for start in range(0, len(share), args.per_device_eval_batch_size):
        numbers = list(share[start : start + args.per_device_eval_batch_size])
        table += zip(numbers, evaluate(numbers), strict=True)
    return [row for _, row in sorted(gather_object(table), key=lambda pair: pair[0])[:total]]


@torch.no_grad()  # inference_mode would gather sharded weights into tensors that training cannot fill again
def kl_and_values(
    actor: ActorCritic, responses: Responses, temperature: float, response_tokens: int
) -> tuple[list[float], list[list[float]]]:
    """Return for each response an estimate of its KL to the reference, in nats, and its tokens' values.

    A value is that of the state in which the token was chosen. `response_tokens` is the most that a response
    may have: every process must run the same number of forwards, whatever its responses.
    """
    tensors = (responses.query_ids, responses.query_mask, responses.response_ids, responses.response_mask)
    size = rows_within_budget(actor.policy, response_tokens)
    kl: list[float] = []
    values: list[list[float]] = []
    for part in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        out = partial(actor, temperature=temperature)(*part)
        reference = partial(actor.reference_logprobs, temperature=temperature)(*part)
        kl += sequence_kl(out.logprobs, reference).tolist()
        values += [row[mask].tolist() for row, mask in zip(out.values, part[-1].bool(), strict=True)]
    return kl, values


def overoptimization_warning(history: list[dict[str, Any]], table: list[Row], metric: str) -> str | None:
    """Return a warning if the reward rose since the best evaluation by `metric`, while `metric` fell.

    A fall counts if it is above two standard errors of the current evaluation, which are over prompts.
    `metric` is the held-out or the gold reward; the trained reward itself has nothing to be compared with.
    `history` is the Trainer's log, with the current evaluation last.
    """
    entries = [entry for entry in history if f"eval_{metric}" in entry]
    by_prompt: dict[int, list[float]] = {}
    for number, row in zip(number_questions(row["prompt"] for row in table), table, strict=True):
        by_prompt.setdefault(number, []).append(row[metric])
    means = [statistics.fmean(values) for values in by_prompt.values()]
    if metric == "reward" or not entries or len(means) < 2:
        return None
    best, now = max(entries, key=lambda entry: entry[f"eval_{metric}"]), entries[-1]
    rise = now["eval_reward"] - best["eval_reward"]
    fall = best[f"eval_{metric}"] - now[f"eval_{metric}"]
    standard_error = statistics.stdev(means) / len(means) ** 0.5
    if rise <= 0 or fall <= 2 * standard_error:
        return None

    reward, held_out = (
        f"{best[f'eval_{name}']:.3f} to {now[f'eval_{name}']:.3f}" for name in ("reward", metric)
    )
    return (
        f"step {now['step']}: since step {best['step']} the reward rose from {reward} and the "
        f"{metric.replace('_', ' ')} fell from {held_out}, at a KL of {now['eval_kl']:.2f}: "
        "the policy exploits the reward model"
    )
