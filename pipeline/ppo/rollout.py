"""One rollout of PPO, in the order in which it happens.

1. Sample a response to each prompt.
2. Score the responses.
3. Compute log-probabilities under the policy and its reference, and values. If an engine sampled, compute its
   importance weights.
4. Shape the rewards: a KL penalty on every token, and the scores: one on the last, or some inside.
5. Estimate advantages and returns.
6. Split the rollout into minibatches, one optimizer step each.

`collect_rollout` does steps 1 to 5 and `iterate_minibatches` step 6; `RolloutDataLoader` passes the result to
the Trainer. The loss is in `pipeline.ppo.loss`, the formulas in `pipeline.ppo.functional`.

Sources: Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024, "The N+ Implementation Details of RLHF
with PPO".
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.generation import Responses, permutation
from pipeline.models.truncation import Truncation
from pipeline.ppo import functional
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.config import PPOConfig

Minibatches = list[list[list[int]]]  # of one PPO epoch: the rows of each micro-batch of each minibatch
TRAINED_ON = ("logprobs", "values", "advantages", "returns", "importance_weights")


@dataclass
class Rollout:
    """A scored rollout of B responses.

    `raw_scores` are the rewards of the responses as the reward function returned them, summed over tokens.
    `token_scores` are normalized; PPO learns from them. Every tensor is (B, T) over response tokens.
    `sampler_log_ratio` is log π − log μ, the trainer's log-probability less the sampler's, both of the
    distribution after truncation; None for the built-in sampler, which has no gap. `importance_weights` are
    None without a gap or without a cap.
    """

    responses: Responses
    raw_scores: list[float]
    token_scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    advantages: Tensor
    returns: Tensor
    sampler_log_ratio: Tensor | None = None
    importance_weights: Tensor | None = None

    def trained_on(self) -> dict[str, Tensor]:
        """Return the tensors that the losses read, by name; importance weights only if there are some."""
        tensors = {name: getattr(self, name) for name in TRAINED_ON}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def mask(self) -> Tensor:
        """(B, T), True on real response tokens."""
        return self.responses.response_mask.bool()

    @property
    def scores(self) -> Tensor:
        """(B,) normalized scores of the responses: the sums of `token_scores`."""
        return self.token_scores.sum(1)

    @property
    def kl(self) -> Tensor:
        """(B,) KL to the reference in nats, one estimate per response."""
        return functional.sequence_kl(self.logprobs, self.ref_logprobs)


def collect_rollout(
    actor: ActorCritic,
    args: PPOConfig,
    number: int,
    *,
    sample: Callable[[list[int]], Responses],
    score: Callable[[Responses, list[int]], tuple[list[float], Tensor]],
    autocast: Callable[[], AbstractContextManager[Any]],
    is_warmup: bool,
    truncation: Truncation,
) -> Rollout:
    """Sample and score the responses of one rollout, and estimate their advantages.

    `number` is the absolute number of the rollout. `sample` gets the global row numbers of this process and
    returns B responses. `score` gets the responses and these rows; it returns the raw reward of each response
    and the (B, T) normalized scores of their tokens. `is_warmup` says whether the rollout trains the critic
    alone. `truncation` is that of the sampler; it is read if an engine sampled.
    """
    # 1. Sample a response to each prompt.
    rows = global_rows(args, number)
    responses = sample(rows)

    # 2. Score the responses.
    raw_scores, token_scores = score(responses, rows)

    # 3. Compute log-probabilities under the policy and its reference, and values.
    is_truncated = responses.sampler_logprobs is not None and not truncation.is_full
    logprobs, ref_logprobs, values, entropy, truncated = _compute_token_stats(
        actor, responses, args, number, autocast, truncation if is_truncated else None
    )
    log_ratio, weights = _compare_with_sampler(responses, truncated, args.importance_cap)

    # 4. Shape the rewards: a KL penalty on every token, and the scores.
    mask = responses.response_mask.bool()
    kl = functional.kl_estimate(logprobs, ref_logprobs, args.kl_estimator)
    rewards = functional.shape_rewards(token_scores, kl, mask, float(actor.kl_coef))

    # 5. Estimate advantages and returns. Whitening comes last: returns keep the scale of the rewards.
    lam, lam_value = _lambdas(mask, args, is_warmup)
    advantages, _ = functional.gae(rewards, values, mask, args.gamma, lam)
    _, returns = functional.gae(rewards, values, mask, args.gamma, lam_value)
    advantages = functional.whiten(advantages, mask)
    return Rollout(
        responses,
        raw_scores,
        token_scores,
        logprobs,
        ref_logprobs,
        values,
        entropy,
        advantages,
        returns,
        log_ratio,
        weights,
    )


def global_rows(args: PPOConfig, number: int) -> list[int]:
    """Return the global row numbers of this process in a rollout.

    All random numbers of a row derive from its number.
    """
    start = (number * args.world_size + args.process_index) * args.rollout_rows
    return list(range(start, start + args.rollout_rows))


def _lambdas(mask: Tensor, args: PPOConfig, is_warmup: bool) -> tuple[Tensor | float, float]:
    """Return GAE's λ of the policy's advantages, one number or one per response, and that of the returns."""
    lam = args.lam if args.lam_length is None else functional.length_adaptive_lam(mask, args.lam_length)
    if is_warmup and args.critic_warmup_patience is not None:
        return lam, 1.0
    return lam, args.lam if args.lam_value is None else args.lam_value


@torch.no_grad()
def _compute_token_stats(
    actor: ActorCritic,
    responses: Responses,
    args: PPOConfig,
    number: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    truncation: Truncation | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (B, T) log-probabilities, reference log-probabilities, values and entropies.

    They are computed in the very micro-batches of the first PPO epoch, in training mode: the probability
    ratio of the first minibatch is then 1 to the bit. The last of the five are the log-probabilities under
    `truncation`, or the first once more without one.
    """
    actor.train()
    shape, device = responses.response_ids.shape, responses.response_ids.device
    logprobs, ref_logprobs, values, entropy = (torch.zeros(shape, device=device) for _ in range(4))
    truncated = logprobs if truncation is None else torch.zeros(shape, device=device)

    for rows in chain.from_iterable(split_minibatches(responses, args, number, ppo_epoch=0)):
        inputs = _trim_padding(responses, rows)
        width = inputs["response_ids"].shape[1]
        with autocast():
            out = actor(**inputs, temperature=args.temperature, truncation=truncation)
            ref_logprobs[rows, :width] = actor.reference_logprobs(**inputs, temperature=args.temperature)
        logprobs[rows, :width] = out.logprobs
        values[rows, :width] = out.values
        entropy[rows, :width] = out.entropy
        if out.truncated_logprobs is not None:
            truncated[rows, :width] = out.truncated_logprobs
    return logprobs, ref_logprobs, values, entropy, truncated


def _compare_with_sampler(
    responses: Responses, logprobs: Tensor, cap: float | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return log π − log μ of an engine's samples and their importance weights, both (B, T).

    `logprobs` are the trainer's, truncated as the sampler's. Raises `UserError` if the sampler's are not of
    their shape, or not log-probabilities.
    """
    sampler_logprobs, mask = responses.sampler_logprobs, responses.response_mask.bool()
    if sampler_logprobs is None:
        return None, None
    if sampler_logprobs.shape != logprobs.shape:
        shapes = f"{tuple(sampler_logprobs.shape)}, expected {tuple(logprobs.shape)}"
        raise UserError(f"ppo: sampler_logprobs have the shape {shapes}, as response_ids have")
    if not ((sampler_logprobs <= 0) & sampler_logprobs.isfinite() | ~mask).all():
        raise UserError(
            "ppo: sampler_logprobs of sampled tokens are above 0 or not finite; expected log-probabilities "
            "under the distribution that was sampled from"
        )
    log_ratio = torch.where(mask, logprobs - sampler_logprobs.to(logprobs), 0.0)
    return log_ratio, None if cap is None else functional.importance_weights(log_ratio, mask, cap)


def iterate_minibatches(rollout: Rollout, args: PPOConfig, number: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the micro-batches of each minibatch of each PPO epoch, in the order of training (step 6)."""
    for ppo_epoch in range(args.num_ppo_epochs):
        for minibatch in split_minibatches(rollout.responses, args, number, ppo_epoch):
            yield [_micro_batch(rollout, rows) for rows in minibatch]


def split_minibatches(responses: Responses, args: PPOConfig, number: int, ppo_epoch: int) -> Minibatches:
    """Partition the rows of a rollout into minibatches, each cut into micro-batches of similar length.

    The rows are shuffled in blocks. A block's permutation depends on its number among the blocks of all
    processes, so that a minibatch is the same on any number of processes.
    """
    lengths = (responses.query_mask.sum(1) + responses.response_mask.sum(1)).tolist()
    micro, blocks = args.per_device_train_batch_size, args.gradient_accumulation_steps
    block_rows = micro * args.num_mini_batches

    minibatches: list[list[int]] = [[] for _ in range(args.num_mini_batches)]
    for block in range(blocks):
        key = (args.seed, "minibatches", number, ppo_epoch, args.process_index * blocks + block)
        order = permutation(block_rows, *key)
        for index, minibatch in enumerate(minibatches):
            minibatch += [block * block_rows + row for row in order[index * micro : (index + 1) * micro]]

    return [_cut(sorted(minibatch, key=lengths.__getitem__), micro) for minibatch in minibatches]


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _micro_batch(rollout: Rollout, rows: list[int]) -> dict[str, Any]:
    inputs: dict[str, Any] = _trim_padding(rollout.responses, rows)
    width = inputs["response_ids"].shape[1]
    inputs |= {name: tensor[rows, :width] for name, tensor in rollout.trained_on().items()}
    return inputs | {"rows": rows}


def _trim_padding(responses: Responses, rows: list[int]) -> dict[str, Tensor]:
    """Return the four tensors of some rows without the padding that none of them needs."""
    query_width = int(responses.query_mask[rows].sum(1).max())
    response_width = int(responses.response_mask[rows].sum(1).max())
    return {
        "query_ids": responses.query_ids[rows][:, -query_width:],
        "query_mask": responses.query_mask[rows][:, -query_width:],
        "response_ids": responses.response_ids[rows][:, :response_width],
        "response_mask": responses.response_mask[rows][:, :response_width],
    }


class RolloutDataLoader:
    """The Trainer's train dataloader: each epoch collects a rollout and yields its micro-batches.

    It is a plain sized iterable, which Accelerate does not wrap, so that no batch is fetched ahead: the live
    policy samples the rollout. `collect` returns the rollout of a number. `demonstrations` gets a rollout, a
    minibatch and its number of rows; it returns one batch for the pretraining loss per micro-batch, and
    inputs common to them. `reduce` sums a tensor over all processes.
    """

    def __init__(
        self,
        args: PPOConfig,
        collect: Callable[[int], Rollout],
        demonstrations: Callable[[int, int, int], tuple[list[Any], dict[str, Any]]],
        reduce: Callable[[Tensor], Tensor],
    ):
        self.args = args
        self.collect = collect
        self.demonstrations = demonstrations
        self.reduce = reduce
        self.number = 0
        self.minibatch: tuple[Rollout, list[int]]  # the rollout and its rows that are trained on

    def __len__(self) -> int:
        """Return the number of micro-batches of a rollout."""
        return self.args.steps_per_rollout * self.args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next rollout; the Trainer calls it, also after a resume."""
        self.number = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rollout = self.collect(self.number)
        for step, micro_batches in enumerate(iterate_minibatches(rollout, self.args, self.number)):
            rows = [row for inputs in micro_batches for row in inputs.pop("rows")]
            self.minibatch = (rollout, rows)
            batches, common = self.demonstrations(self.number, step, len(rows))
            common |= {
                "first": step == 0,
                "num_tokens": self.reduce(rollout.mask[rows].sum()),
            }
            for inputs, demonstrations in zip(micro_batches, batches, strict=True):
                is_last = inputs is micro_batches[-1]
                yield inputs | common | {"demonstrations": demonstrations, "last": is_last}
