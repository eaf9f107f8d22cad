"""`PPOConfig`: everything PPO can be told, checked before a model is loaded."""

import math
from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainingArguments

from pipeline.ppo.functional import KLKind

CHOICES = {"kl_estimator": ("k1", "k2", "k3"), "score_normalization": ("none", "reference", "running"), "value_init": ("zero", "reward")}

UNREAD = {  # what TrainingArguments offers and PPO would read wrongly -> the value that leaves it off, what to set instead
    "max_steps": (-1, "num_rollouts"), "load_best_model_at_end": (False, "nothing: best/ holds the best"),
    "metric_for_best_model": (None, "nothing: best/ holds the best"), "fp16": (False, "bf16"),
    "greater_is_better": (None, "nothing"), "neftune_noise_alpha": (None, "nothing"), "label_smoothing_factor": (0.0, "nothing"),
}  # fmt: skip

BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")

POSITIVE = (
    *BATCHES,
    "num_rollouts",
    "num_ppo_epochs",
    "num_mini_batches",
    "response_tokens",
    "temperature",
    "generation_batch_size",
    "eval_samples",
    "kl_horizon",
)

POSITIVE_OR_NONE = ("kl_target", "target_kl", "score_clip", "dual_clip", "max_kl")

NOT_NEGATIVE = ("kl_coef", "clip_low", "clip_high", "clip_value", "vf_coef", "entropy_coef", "ptx_coef", "top_k", "critic_warmup_rollouts")


@dataclass
class PPOConfig(TrainingArguments):
    """`TrainingArguments` plus PPO's own.

    A rollout holds `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches` answers per process; each of its
    `num_ppo_epochs × num_mini_batches` optimizer steps is one step of the Trainer. Saving and evaluating happen between rollouts:
    `save_steps` (a tenth of the run by default), `eval_steps` and `logging_steps` are rounded up to whole rollouts. An evaluation draws
    `eval_samples` answers to each held-out prompt.

    Rollouts: `response_tokens` at most and `min_response_tokens` at least; `stop_token`, a token's text, ends an answer as EOS does;
    `temperature` shapes policy and reference alike, `top_k` and `top_p` only what is drawn.

    Scores: normalised (`score_normalization`: by the reference sample of the reward artifact, or by the mean and deviation of all scores
    so far), then clipped to ± `score_clip`, then `missing_eos_penalty` is taken off an answer that did not end.

    KL: `kl_coef` is fixed, or, with a `kl_target` in nats per answer, adaptive over `kl_horizon` answers. Once a minibatch has moved the
    policy by more than `target_kl` nats per token from where it drew the rollout, the rest of the rollout is left out. Above `max_kl` nats
    per answer from the reference the run stops.

    Losses: `policy + vf_coef · value − entropy_coef · entropy + ptx_coef · cross-entropy of demonstrations`. During the first
    `critic_warmup_rollouts` only the value head learns; `value_init` starts it at zero, or as the reward model's head.

    >>> from pipeline import PPOConfig
    >>> args = PPOConfig("out", num_rollouts=50, num_mini_batches=2, per_device_train_batch_size=16, kl_target=6.0)
    >>> args.rollout_rows, args.steps_per_rollout
    (32, 8)
    >>> PPOConfig("out", clip_low=1.5)
    Traceback (most recent call last):
    ValueError: clip_low=1.5: expected less than 1
    """

    RESERVED: ClassVar[dict[str, str]] = {"num_train_epochs": "training.num_rollouts"}

    learning_rate: float = 1e-5
    adam_epsilon: float = 1e-5
    logging_steps: float = 1
    save_steps: float = 0.1
    num_rollouts: int = 100
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    response_tokens: int = 64
    min_response_tokens: int = 0
    stop_token: str | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generation_batch_size: int = 64
    eval_samples: int = 1
    score_normalization: str = "reference"
    score_clip: float | None = None
    missing_eos_penalty: float = 1.0
    kl_estimator: KLKind = "k1"
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000
    target_kl: float | None = None
    max_kl: float | None = 200.0
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    clip_value: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    value_init: str = "zero"
    critic_warmup_rollouts: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name, (off, instead) in UNREAD.items():
            if getattr(self, name) != off:
                raise ValueError(f"{name}={getattr(self, name)!r} is not for PPO; set instead: {instead}")
        if self.save_strategy == "best":
            raise ValueError("save_strategy='best' is not for PPO, which keeps best/ anyway and resumes from checkpoints; set steps")
        for name in POSITIVE:
            _expect(self, name, getattr(self, name) > 0, "more than 0")
        for name in POSITIVE_OR_NONE:
            _expect(self, name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0, or none")
        for name in NOT_NEGATIVE:
            _expect(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("gamma", "lam"):
            _expect(self, name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        _expect(self, "top_p", 0 < self.top_p <= 1, "a number above 0, at most 1")
        _expect(self, "clip_low", self.clip_low < 1, "less than 1")
        _expect(self, "dual_clip", self.dual_clip is None or self.dual_clip > 1, "more than 1, or none")
        _expect(self, "min_response_tokens", 0 <= self.min_response_tokens <= self.response_tokens, "at most response_tokens")
        self.num_train_epochs = self.num_rollouts
        self.remove_unused_columns = False
        for name in ("save", "eval", "logging"):
            if getattr(self, f"{name}_strategy") == "epoch":  # one is a rollout
                setattr(self, f"{name}_strategy", "steps")
                setattr(self, f"{name}_steps", 1)
            setattr(self, f"{name}_steps", self._whole_rollouts(getattr(self, f"{name}_steps")))
        super().__post_init__()
        answers = self.rollout_rows * self.world_size
        if self.kl_target is not None and answers >= 5 * self.kl_horizon:  # the coefficient could turn negative
            raise ValueError(f"kl_horizon={self.kl_horizon:g}: expected more than a fifth of the {answers} answers of a rollout")

    def _whole_rollouts(self, steps: float | None) -> int:
        """Steps, or (below 1) a fraction of all of them, rounded up to whole rollouts."""
        wanted = steps or 1
        total = self.num_rollouts * self.steps_per_rollout
        return self.steps_per_rollout * math.ceil((wanted * total if wanted < 1 else wanted) / self.steps_per_rollout)

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def rollout_rows(self) -> int:
        """Answers per rollout and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def drawing(self) -> dict[str, object]:
        """How answers are drawn, as `pipeline.models.generation.generate` takes it."""
        names = ("temperature", "top_k", "top_p", "min_response_tokens", "stop_token")
        return {name: getattr(self, name) for name in names} | {"batch_size": self.generation_batch_size}


def _expect(config: PPOConfig, name: str, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name}={getattr(config, name)!r}: expected {expected}")
