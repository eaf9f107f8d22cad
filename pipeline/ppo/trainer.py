"""`PPOTrainer`: rollouts become a stream of minibatches that `transformers.Trainer` trains on.

One Trainer epoch is one rollout: sample answers, score them, then `num_ppo_epochs` passes over them in `num_mini_batches` steps each.
The optimizer, clipping, precision, callbacks, checkpoints and distributed wrapping are the Trainer's own.
Sources: Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from pipeline import encoding
from pipeline.ppo import math as ppo
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.reward.sources import RewardFunction, RewardSource
from pipeline.sampling import Answers, generate, noise, permutation

EVALUATION = "evaluation"  # stands where a rollout's number stands: evaluations draw the same noise every time


@dataclass
class PPOConfig(TrainingArguments):
    """`TrainingArguments` plus PPO's own.

    A rollout holds `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches` answers per process; each of its
    `num_ppo_epochs × num_mini_batches` optimizer steps is one step of the Trainer. Saving and evaluating happen between rollouts:
    `save_steps` and `eval_steps` are rounded up to whole rollouts, and `logging_steps` counts as one rollout where it is less.
    """

    RESERVED: ClassVar[dict[str, str]] = {"num_train_epochs": "training.num_rollouts"}

    learning_rate: float = 1e-5
    adam_epsilon: float = 1e-5
    num_rollouts: int = 100
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    response_tokens: int = 64
    temperature: float = 1.0
    kl_coef: float = 0.05
    kl_estimator: ppo.KLKind = "k1"
    kl_target: float | None = None
    kl_horizon: float = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    score_normalization: str = "reference"
    missing_eos_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("kl_estimator", ("k1", "k2", "k3")), ("score_normalization", ("none", "reference"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name in ("num_rollouts", "num_ppo_epochs", "num_mini_batches", "response_tokens", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected more than 0")
        self.num_train_epochs = self.num_rollouts
        self.remove_unused_columns = False
        for name in ("save_steps", "eval_steps", "logging_steps"):
            setattr(self, name, self.steps_per_rollout * math.ceil((getattr(self, name) or 1) / self.steps_per_rollout))
        super().__post_init__()

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def rollout_rows(self) -> int:
        """Answers per rollout and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches


@dataclass
class Experience:
    """A scored rollout of B answers; all but `answers` and `scores` (B,) are (B, T)."""

    answers: Answers
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def mask(self) -> Tensor:
        return self.answers.response_mask.bool()


class PPOTrainer(Trainer):
    """PPO on `transformers.Trainer`.

    `policy`: a causal language model, or a `PeftModel` around one (its reference is then the adapter named `reference`, or the bare base).
    `reward`: a `RewardSource`, or a function of TRL's signature. `train_dataset`, `eval_dataset`: rows with a `prompt` (text or
    messages); their other columns are handed to the reward. `gold`: an optional true reward, evaluated and never trained on.
    """

    args: PPOConfig
    model: Any
    processing_class: PreTrainedTokenizerBase
    train_dataset: Dataset
    eval_dataset: Any

    loss_is_scaled_for_ga = True  # the loss is divided by the tokens of the whole minibatch

    def __init__(
        self,
        policy: Any,
        reward: RewardSource | RewardFunction,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        gold: RewardFunction | None = None,
        max_prompt_tokens: int = 256,
        **kwargs: Any,
    ) -> None:
        self.reward = reward if isinstance(reward, RewardSource) else RewardSource(reward)
        self.gold = gold
        self.max_prompt_tokens = max_prompt_tokens
        self._figures: dict[str, list[Any]] = defaultdict(list)
        model = ActorCritic(policy, args.kl_coef)
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model=model, args=args, processing_class=processing_class, **data, **kwargs)
        self.actor: ActorCritic = self.model

    # The stream of minibatches

    def get_train_dataloader(self) -> Any:
        return RolloutStream(self)

    def collect(self, rollout: int) -> Experience:
        """Sample and score the answers of one rollout, by its absolute number."""
        rows = self._rows(rollout)
        answers = self._answer(self.train_dataset, [self._prompt_index(row) for row in rows], rollout, rows)
        scores = self._scores(answers, self.train_dataset, [self._prompt_index(row) for row in rows])
        experience = self._assess(answers, scores, self.plan(rollout, 0, answers))
        self._record(experience)
        self._update_kl_coef(experience)
        return experience

    def plan(self, rollout: int, ppo_epoch: int, answers: Answers) -> list[list[list[int]]]:
        """The rows of each minibatch of a PPO epoch, cut into micro-batches of like lengths."""
        args, lengths = self.args, answers.response_mask.sum(1).tolist()
        order = permutation(args.rollout_rows, args.seed, "minibatches", rollout, ppo_epoch, args.process_index)
        size, micro = args.rollout_rows // args.num_mini_batches, args.per_device_train_batch_size
        minibatches = [sorted(order[start : start + size], key=lambda i: lengths[i]) for start in range(0, len(order), size)]
        return [[minibatch[start : start + micro] for start in range(0, size, micro)] for minibatch in minibatches]

    # What the Trainer calls

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        """Policy loss + vf_coef · value loss − entropy_coef · entropy of a micro-batch, over the minibatch's tokens on all ranks."""
        args, mask, tokens = self.args, inputs["response_mask"].bool(), inputs["num_tokens"]
        out = model(*(inputs[name] for name in ("query_ids", "query_mask", "response_ids", "response_mask")), args.temperature)
        if inputs["first"]:
            self._check_ratio(out.logprobs, inputs["logprobs"], mask)
        policy = ppo.policy_loss(
            out.logprobs, inputs["logprobs"], inputs["advantages"], mask, args.clip_low, args.clip_high, num_tokens=tokens
        )
        value = ppo.value_loss(out.values, inputs["values"], inputs["returns"], mask, args.clip_value, num_tokens=tokens)
        # Micro-batches, and those of all ranks, add up to a minibatch, whose mean over the logging window is shown.
        parts = args.gradient_accumulation_steps * args.world_size
        for name, figure in (
            ("loss/policy_avg", policy.loss), ("loss/value_avg", value.loss), ("policy/approxkl_avg", policy.approx_kl),
            ("policy/clipfrac_avg", policy.clip_fraction), ("val/clipfrac_avg", value.clip_fraction),
        ):  # fmt: skip
            self._figures[name].append(figure.detach() * parts)
        loss = policy.loss + args.vf_coef * value.loss
        if args.entropy_coef:
            loss = loss - args.entropy_coef * torch.where(mask, out.entropy, 0.0).sum() / tokens
        return loss * args.world_size  # gradients are averaged over ranks

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = torch.tensor([statistics.fmean(map(float, figures)) for figures in self._figures.values()], device=self.args.device)
            logs |= dict(zip(self._figures, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            self._figures.clear()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean reward, gold reward (where there is one), KL to the reference and length of one answer to each held-out prompt."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        figures: dict[str, list[float]] = defaultdict(list)
        for start in range(0, len(data), self.args.per_device_eval_batch_size):
            rows = list(range(start, min(start + self.args.per_device_eval_batch_size, len(data))))
            answers = self._answer(data, rows, EVALUATION, rows)
            figures["reward"] += self._call(self.reward.score, answers, data, rows)
            if self.gold is not None:
                figures["gold_reward"] += self._call(self.gold, answers, data, rows)
            figures["kl"] += self.kl_to_reference(answers)
            figures["response_tokens"] += answers.response_mask.sum(1).tolist()
            figures["ended_fraction"] += map(float, answers.ended)
        metrics = {f"{metric_key_prefix}_{name}": statistics.fmean(values) for name, values in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained (policy or adapter, value head, KL coefficient) as one safetensors file."""
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in self.accelerator.unwrap_model(self.actor).state_dict().items()},
                folder / "model.safetensors",
                metadata={"format": "pt"},
            )

    # Parts of a rollout

    @torch.inference_mode()
    def kl_to_reference(self, answers: Answers) -> list[float]:
        """log p − log q summed over each answer (k1): an unbiased sample of the KL of whole answers, in nats."""
        tensors = (answers.query_ids, answers.query_mask, answers.response_ids, answers.response_mask)
        with self.accelerator.autocast():
            logprobs = self.actor(*tensors, self.args.temperature).logprobs
            difference = logprobs - self.actor.reference_logprobs(*tensors, self.args.temperature)
        return torch.where(answers.response_mask.bool(), difference, 0.0).sum(1).tolist()

    def _rows(self, rollout: int) -> list[int]:
        """The global row numbers of this process in a rollout."""
        start = (rollout * self.args.world_size + self.args.process_index) * self.args.rollout_rows
        return list(range(start, start + self.args.rollout_rows))

    def _prompt_index(self, row: int) -> int:
        """Prompts are drawn in a new permutation for every pass over them."""
        turn, place = divmod(row, len(self.train_dataset))
        return permutation(len(self.train_dataset), self.args.seed, "prompts", turn)[place]

    def _answer(self, data: Dataset, indices: Sequence[int], rollout: Any, rows: Sequence[int]) -> Answers:
        prompts = [encoding.prompt_ids(self.processing_class, data[i]["prompt"])[-self.max_prompt_tokens :] for i in indices]
        drawn = noise(self.args.seed, rollout, rows, self.args.response_tokens)
        with self.accelerator.autocast():
            return generate(self.actor.policy, self.processing_class, prompts, drawn, self.args.temperature)

    def _call(self, function: RewardFunction, answers: Answers, data: Dataset, indices: Sequence[int]) -> list[float]:
        records = data.select(indices)[:]
        prompts = records.pop("prompt")
        scores = function(prompts=prompts, completions=answers.texts, completion_ids=answers.token_lists(), ended=answers.ended, **records)
        return [float(score) for score in scores]

    def _scores(self, answers: Answers, data: Dataset, indices: Sequence[int]) -> Tensor:
        """(B,) scores as PPO sees them: normalised, less the penalty of an answer that did not end."""
        raw = self._call(self.reward.score, answers, data, indices)
        self._figures["objective/raw_scores"].append(statistics.fmean(raw))
        scores = torch.tensor(raw, device=answers.query_ids.device)
        if self.args.score_normalization == "reference":
            scores = (scores - self.reward.mean) / self.reward.std
        return scores - self.args.missing_eos_penalty * (1 - torch.tensor(answers.ended, device=scores.device).float())

    @torch.no_grad()
    def _assess(self, answers: Answers, scores: Tensor, micro_batches: list[list[list[int]]]) -> Experience:
        """Log-probabilities, values, advantages and returns, computed in the very micro-batches of the first PPO epoch: the ratio of its
        first minibatch is then 1 to the bit."""
        self.actor.train()
        shape, device = answers.response_ids.shape, answers.response_ids.device
        logprobs, ref_logprobs, values, entropy = (torch.zeros(shape, device=device) for _ in range(4))
        for rows in (rows for minibatch in micro_batches for rows in minibatch):
            inputs = _trim(answers, rows)
            width = inputs["response_ids"].shape[1]
            with self.accelerator.autocast():
                out = self.actor(**inputs, temperature=self.args.temperature)
                ref_logprobs[rows, :width] = self.actor.reference_logprobs(**inputs, temperature=self.args.temperature)
            logprobs[rows, :width], values[rows, :width], entropy[rows, :width] = out.logprobs, out.values, out.entropy
        mask = answers.response_mask.bool()
        kl = ppo.kl_estimate(logprobs, ref_logprobs, self.args.kl_estimator)
        rewards = ppo.shape_rewards(scores, kl, mask, float(self.actor.kl_coef))
        advantages, returns = ppo.gae(rewards, values, mask, self.args.gamma, self.args.lam)
        return Experience(answers, logprobs, ref_logprobs, values, entropy, scores, ppo.whiten(advantages, mask), returns)

    def _update_kl_coef(self, experience: Experience) -> None:
        if self.args.kl_target is not None:
            kl = torch.where(experience.mask, experience.logprobs - experience.ref_logprobs, 0.0).sum(1).mean()
            controller = ppo.AdaptiveKL(float(self.actor.kl_coef), self.args.kl_target, self.args.kl_horizon)
            controller.update(float(self.accelerator.reduce(kl, "mean")), self.args.rollout_rows * self.args.world_size)
            self.actor.kl_coef.fill_(controller.coef)

    def _record(self, experience: Experience) -> None:
        """The rollout's figures, over real tokens, under the names TRL's PPO had."""
        mask, answers = experience.mask, experience.answers
        kl = torch.where(mask, experience.logprobs - experience.ref_logprobs, 0.0).sum(1)
        penalty = -float(self.actor.kl_coef) * kl
        figures: dict[str, Tensor | float] = {
            "objective/kl": kl.mean(), "objective/kl_coef": self.actor.kl_coef, "objective/entropy": experience.entropy[mask].mean(),
            "objective/scores": experience.scores.mean(), "objective/non_score_reward": penalty.mean(),
            "objective/rlhf_reward": (experience.scores + penalty).mean(), "response/tokens": mask.sum(1).float().mean(),
            "response/ended_fraction": statistics.fmean(answers.ended),
            "val/explained_variance": ppo.explained_variance(experience.values, experience.returns, mask),
        }  # fmt: skip
        for name, figure in figures.items():
            self._figures[name].append(float(figure))

    def _check_ratio(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> None:
        worst = float(torch.where(mask, logprobs.detach() - old_logprobs, 0.0).abs().max())
        if worst != 0.0:
            raise RuntimeError(
                f"on a rollout's first minibatch the log-probabilities are up to {worst:.2g} off those just computed; expected equal ones: "
                "something in the model is random or depends on the mode (dropout, a template, a patched forward)"
            )


class RolloutStream:
    """The train dataloader: a sized iterable that Accelerate never wraps, so that the live model rolls out when its turn has come."""

    def __init__(self, trainer: PPOTrainer):
        self.trainer, self.rollout = trainer, 0

    def __len__(self) -> int:
        return self.trainer.args.steps_per_rollout * self.trainer.args.gradient_accumulation_steps

    def set_epoch(self, epoch: int) -> None:
        self.rollout = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.trainer
        experience = trainer.collect(self.rollout)
        for ppo_epoch in range(trainer.args.num_ppo_epochs):
            for number, minibatch in enumerate(trainer.plan(self.rollout, ppo_epoch, experience.answers)):
                tokens = trainer.accelerator.reduce(sum(experience.mask[rows].sum() for rows in minibatch), "sum")
                for rows in minibatch:
                    yield _micro_batch(experience, rows, tokens) | {"first": ppo_epoch == number == 0}


def _trim(answers: Answers, rows: list[int]) -> dict[str, Tensor]:
    """The four tensors of some rows, without the padding that none of them needs."""
    queries = int(answers.query_mask[rows].sum(1).max())
    responses = int(answers.response_mask[rows].sum(1).max())
    return {
        "query_ids": answers.query_ids[rows][:, -queries:], "query_mask": answers.query_mask[rows][:, -queries:],
        "response_ids": answers.response_ids[rows][:, :responses], "response_mask": answers.response_mask[rows][:, :responses],
    }  # fmt: skip


def _micro_batch(experience: Experience, rows: list[int], tokens: Tensor) -> dict[str, Any]:
    inputs: dict[str, Any] = _trim(experience.answers, rows)
    width = inputs["response_ids"].shape[1]
    for name in ("logprobs", "values", "advantages", "returns"):
        inputs[name] = getattr(experience, name)[rows, :width]
    return inputs | {"num_tokens": tokens}
