"""`PPOConfig`: the arguments of `PPOTrainer`, checked before a model is loaded."""

import functools
import math
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from pipeline.errors import UserError
from pipeline.ppo.functional import KLKind
from pipeline.ppo.trl_names import CONFIG_NAMES
from pipeline.training.field_types import check_types
from pipeline.training.ranges import check_ranges
from pipeline.training.reserved import default_of, suggest_name

CHOICES = {
    "kl_estimator": ("k1", "k2", "k3"),
    "score_normalization": ("none", "reference", "running"),
    "value_init": ("zero", "reward"),
}
# Arguments of TrainingArguments that PPO does not read, or would misread, and what to set instead. Their
# default values are accepted.
BEST = "nothing: best/ holds the best"
ROLLOUTS = "nothing: batches are those of the rollout"
EVALUATION = "nothing: evaluations sample and score responses"
LOSS = "nothing: the loss is PPO's"
UNSUPPORTED = (
    dict.fromkeys(("num_train_epochs", "max_steps"), "num_rollouts")
    | dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), BEST)
    | dict.fromkeys(
        (
            "train_sampling_strategy",
            "length_column_name",
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
            "ignore_data_skip",
            "auto_find_batch_size",
        ),
        ROLLOUTS,
    )
    | dict.fromkeys(
        (
            "prediction_loss_only",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "include_for_metrics",
            "label_names",
            "bf16_full_eval",
            "fp16_full_eval",
        ),
        EVALUATION,
    )
    | dict.fromkeys(
        (
            "neftune_noise_alpha",
            "label_smoothing_factor",
            "average_tokens_across_devices",
            "include_num_input_tokens_seen",
            "use_liger_kernel",
            "liger_kernel_config",
        ),
        LOSS,
    )
    | dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "nothing: the model that samples and the one that learns would compute other numbers",
    )
    | dict.fromkeys(
        ("push_to_hub", "hub_strategy", "hub_always_push"), "nothing: call push_to_hub() after training"
    )
    | {"fp16": "bf16"}
)
POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_rollouts",
    "num_ppo_epochs",
    "num_mini_batches",
    "response_tokens",
    "temperature",
    "generation_batch_size",
    "eval_samples",
    "kl_horizon",
)
POSITIVE_OR_NONE = (
    "kl_target",
    "target_kl",
    "score_clip",
    "dual_clip",
    "max_kl",
    "lam_length",
    "critic_warmup_patience",
)
NOT_NEGATIVE = (
    "kl_coef",
    "clip_low",
    "clip_high",
    "vf_coef",
    "entropy_coef",
    "ptx_coef",
    "top_k",
    "critic_warmup_rollouts",
)


def refuse_unknown_names(cls: type["PPOConfig"]) -> type["PPOConfig"]:
    """Decorate the dataclass: an unknown name raises `TypeError` with its counterpart or the nearest one."""
    init = cls.__init__
    known = {argument.name for argument in fields(cls) if argument.init}

    @functools.wraps(init)
    def checked(self: "PPOConfig", *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in known:
                hint = suggest_name(name, known, cls.TRL_NAMES)
                raise TypeError(f"{cls.__name__} has no {name!r}{hint}")
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


@refuse_unknown_names
@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`: those of `TrainingArguments`, and PPO's own.

    Each process generates `per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches`
    responses per rollout. The Trainer counts `num_ppo_epochs × num_mini_batches` optimizer steps per rollout.
    Saving, evaluating and logging happen between rollouts; their steps are rounded up to whole rollouts.

    Scores are normalised, then clipped, then lowered by the penalty for a missing EOS. The KL penalty is a
    reward on every token (Ziegler et al. 2019, eq. 2). Advantages are GAE's (Schulman et al. 2016, eq. 16).
    The policy loss is clipped (Schulman et al. 2017, eq. 7). The whole loss is
    `policy + vf_coef · value − entropy_coef · entropy + ptx_coef · cross-entropy of demonstrations`.

    >>> from pipeline import PPOConfig
    >>> batches = {"num_mini_batches": 2, "per_device_train_batch_size": 16}
    >>> args = PPOConfig("out", num_rollouts=50, kl_target=6.0, **batches)
    >>> args.rollout_rows, args.steps_per_rollout
    (32, 8)
    >>> PPOConfig("out", clip_low=1.5)
    Traceback (most recent call last):
    ValueError: clip_low=1.5: expected less than 1
    """

    RESERVED: ClassVar[dict[str, str]] = {"num_train_epochs": "training.num_rollouts"}
    TRL_NAMES: ClassVar[dict[str, str]] = CONFIG_NAMES

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    adam_epsilon: float = field(
        default=1e-5, metadata={"help": "Adam's epsilon; the usual one of PPO, above Adam's own 1e-8."}
    )
    logging_steps: float = field(
        default=1,
        metadata={"help": "Steps between log entries, in whole rollouts; below 1 a fraction of the run."},
    )
    save_steps: float = field(
        default=0.1,
        metadata={"help": "Steps between checkpoints, in whole rollouts; below 1 a fraction of the run."},
    )
    num_rollouts: int = field(default=100, metadata={"help": "Number of rollouts; the length of the run."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(
        default=1, metadata={"help": "Minibatches of a rollout; each is one optimizer step."}
    )
    response_tokens: int = field(default=64, metadata={"help": "Maximum new tokens of a response."})
    min_response_tokens: int = field(
        default=0, metadata={"help": "Minimum new tokens of a response; EOS cannot come earlier."}
    )
    stop_token: str | None = field(
        default=None, metadata={"help": "Text of a token that ends a response as EOS does."}
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature; it divides the logits of policy and reference in the losses too."
        },
    )
    top_k: int = field(
        default=0,
        metadata={"help": "Sample from this many most likely tokens, not used in the losses; 0 is all."},
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Sample from the most likely tokens of this total probability, not used in the losses."
        },
    )
    generation_batch_size: int = field(
        default=64, metadata={"help": "Responses that are generated together per process."}
    )
    eval_samples: int = field(default=1, metadata={"help": "Responses for each evaluation prompt."})
    score_normalization: str = field(
        default="reference",
        metadata={
            "help": "Centre and scale scores by the reward's reference sample, or by all scores so far."
        },
    )
    score_clip: float | None = field(
        default=None, metadata={"help": "Clip normalised scores to ± this; no value does not clip."}
    )
    missing_eos_penalty: float = field(
        default=1.0,
        metadata={"help": "Subtracted from the score of a response that did not end within response_tokens."},
    )
    kl_estimator: KLKind = field(
        default="k1",
        metadata={"help": "KL estimate per token: k1 = log p − log q, k2 = k1²/2, k3 = exp(−k1) − 1 + k1."},
    )
    kl_coef: float = field(
        default=0.05,
        metadata={
            "help": "Coefficient of the KL penalty to the reference; with a kl_target the initial one."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Adapt kl_coef to this mean KL in nats per response; no value keeps it fixed."},
    )
    kl_horizon: float = field(
        default=10_000, metadata={"help": "Responses over which kl_coef adapts; more is slower."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Skip the rest of a rollout if KL to its sampling policy exceeds this, in nats per token."
        },
    )
    max_kl: float | None = field(
        default=200.0,
        metadata={
            "help": "Stop the run if a rollout's mean KL to the reference exceeds this, in nats per response."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(
        default=0.95,
        metadata={"help": "GAE's lambda: 1 is Monte-Carlo returns, 0 one-step temporal differences."},
    )
    lam_value: float | None = field(
        default=None,
        metadata={"help": "Lambda of the returns that the critic learns; no value is lam."},
    )
    lam_length: float | None = field(
        default=None,
        metadata={
            "help": "Lambda of the policy is 1 − 1 / (this · response tokens), at least 0; no value is lam."
        },
    )
    clip_low: float = field(default=0.2, metadata={"help": "Clip the probability ratio below 1 − this."})
    clip_high: float = field(default=0.2, metadata={"help": "Clip the probability ratio above 1 + this."})
    dual_clip: float | None = field(
        default=None,
        metadata={
            "help": "Bound the loss of negative advantages A at −dual_clip · A (Ye et al. 2020, eq. 5)."
        },
    )
    importance_cap: float | None = field(
        default=2.0,
        metadata={
            "help": "Cap of the weights π / μ that correct the policy loss of tokens that an engine sampled; "
            "no value does not correct."
        },
    )
    clip_value: float | None = field(
        default=0.2,
        metadata={
            "help": "Clip new values to the old ones ± this in the value loss; no value does not clip."
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Coefficient of the entropy bonus."})
    ptx_coef: float = field(
        default=0.0,
        metadata={"help": "Coefficient of the cross-entropy of demonstrations (Ouyang et al. 2022, eq. 2)."},
    )
    value_init: str = field(
        default="zero", metadata={"help": "Initial value head: zero, or the reward model's head."}
    )
    critic_warmup_rollouts: int = field(
        default=0, metadata={"help": "Number of first rollouts that train the critic alone."}
    )
    critic_warmup_patience: int | None = field(
        default=None,
        metadata={
            "help": "Fit Monte-Carlo returns in the warm-up, and end it early: once the variance explained "
            "in new rollouts has not risen for so many."
        },
    )

    def __post_init__(self) -> None:
        self._check_values()
        self.num_train_epochs = self.num_rollouts
        self.remove_unused_columns = False
        self._round_steps()
        super().__post_init__()

        responses = self.rollout_rows * self.world_size
        # Otherwise the coefficient could turn negative.
        if self.kl_target is not None and responses >= 5 * self.kl_horizon:
            raise ValueError(
                f"kl_horizon={self.kl_horizon:g}: expected more than a fifth of the {responses} responses "
                "of a rollout"
            )

    def _check_values(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for argument in fields(self):
            self._check_supported(argument)
        check_types(self)
        if self.save_strategy == "best":
            raise ValueError(
                "save_strategy='best' is not for PPO, which keeps best/ anyway and resumes from checkpoints; "
                "set steps"
            )

        if self.lr_scheduler_type == "reduce_lr_on_plateau":
            raise ValueError(
                "lr_scheduler_type='reduce_lr_on_plateau' is not for PPO, which has no eval_loss"
            )

        for name in POSITIVE:
            self._expect(name, getattr(self, name) > 0, "more than 0")
        for name in POSITIVE_OR_NONE:
            self._expect(name, getattr(self, name) is None or getattr(self, name) > 0, "more than 0, or none")
        for name in NOT_NEGATIVE:
            self._expect(name, getattr(self, name) >= 0, "0 or more")
        self._expect("clip_value", self.clip_value is None or self.clip_value >= 0, "0 or more, or none")
        for name in ("gamma", "lam"):
            self._expect(name, 0 <= getattr(self, name) <= 1, "a number from 0 to 1")
        in_range = self.lam_value is None or 0 <= self.lam_value <= 1
        self._expect("lam_value", in_range, "a number from 0 to 1, or none")
        self._expect(
            "importance_cap", self.importance_cap is None or self.importance_cap >= 1, "1 or more, or none"
        )
        self._expect("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1")
        self._expect("clip_low", self.clip_low < 1, "less than 1")
        self._expect("dual_clip", self.dual_clip is None or self.dual_clip > 1, "more than 1, or none")
        if self.critic_warmup_patience is not None:
            at_most, learns = self.critic_warmup_rollouts, self.vf_coef > 0
            self._expect("critic_warmup_rollouts", at_most > 0, "more than 0, with critic_warmup_patience")
            self._expect("vf_coef", learns, "more than 0, with critic_warmup_patience")
        in_range = 0 <= self.min_response_tokens <= self.response_tokens
        self._expect("min_response_tokens", in_range, "at most response_tokens")
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Raise `ValueError` for a value outside of the range or the choices that `training:` has for it."""
        values = {
            argument.name: value
            for argument in fields(self)
            if (value := getattr(self, argument.name)) != default_of(argument)
            and (isinstance(value, int | float) or argument.metadata.get("choices"))
        }
        try:
            check_ranges("", values, type(self))
        except UserError as error:
            raise ValueError(str(error).removeprefix(".")) from None

    def _check_supported(self, argument: Field[Any]) -> None:
        name, value = argument.name, getattr(self, argument.name)
        self._expect(name, not isinstance(value, float) or math.isfinite(value), "a finite number")
        if name == "num_train_epochs" and value == self.num_rollouts:  # of arguments that are copied
            return
        if name in UNSUPPORTED and value != default_of(argument):
            raise ValueError(f"{name}={value!r} is not for PPO; set instead: {UNSUPPORTED[name]}")

    def _expect(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    def _round_steps(self) -> None:
        """Round the steps of saving, evaluating and logging up to whole rollouts; an epoch is one rollout."""
        for name in ("save", "eval", "logging"):
            if getattr(self, f"{name}_strategy") == "epoch":
                setattr(self, f"{name}_strategy", "steps")
                setattr(self, f"{name}_steps", 1)
            setattr(self, f"{name}_steps", self._whole_rollouts(getattr(self, f"{name}_steps")))

    def _whole_rollouts(self, steps: float | None) -> int:
        """Return `steps`, or below 1 that fraction of the run, rounded up to whole rollouts."""
        steps = steps or 1
        if steps < 1:
            steps *= self.num_rollouts * self.steps_per_rollout
        return self.steps_per_rollout * math.ceil(steps / self.steps_per_rollout)

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def rollout_rows(self) -> int:
        """Responses per rollout and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def sampling_params(self) -> dict[str, object]:
        """Sampling options, as `pipeline.models.generation.generate` takes them."""
        names = ("temperature", "top_k", "top_p", "min_response_tokens", "stop_token")
        return {name: getattr(self, name) for name in names} | {"batch_size": self.generation_batch_size}
