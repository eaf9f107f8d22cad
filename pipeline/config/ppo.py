"""The PPO stage's keys."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Overlong, PolicyStage, StageInput, StrictModel
from pipeline.config.reward import (
    FunctionSection,
    Reward,
    as_rewards,
    check_scorer_keys,
    check_sum,
    from_source_string,
    reward_input,
)
from pipeline.config.rollouts import RolloutsSection


class EvaluationSection(StrictModel):
    """Evaluations while PPO trains: a held-out scorer, early stopping, and the policies to keep."""

    scorer: Reward | None = None
    """Held-out reward that PPO is not trained on; the best checkpoint in `best/` is chosen by it."""

    patience: int = Field(3, gt=0)
    """Evaluations in a row without a new best after which the run stops; only read with a `scorer`."""

    keep: bool = False
    """Keep the policy of each evaluation in `policies/step-N/`, for evaluate to measure."""

    _scorer = field_validator("scorer", mode="before")(from_source_string)


class CriticSection(StrictModel):
    """PPO's critic, which predicts the return from each token on: where it is and what it starts from."""

    on: Literal["trunk", "adapter", "model"] = "trunk"
    """The value head reads the policy's trunk, a LoRA adapter of its own on that backbone, or a model of its
    own, trained in full."""

    source: str | None = None
    """Ppo artifact or critic's folder to start from; for `model` also a policy or reward model; null is zero
    values, and the `policy` for `model`."""

    learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the critic's parameters, on the same schedule; null is `training.learning_rate`."""

    lora: dict[str, Any] | None = None
    """Arguments of peft.LoraConfig for `on: adapter`; null are those of the policy's adapter."""

    @model_validator(mode="after")
    def check_lora(self) -> "CriticSection":
        if self.lora is not None and self.on != "adapter":
            raise ValueError("critic.lora is only read with critic.on: adapter; remove it")
        if self.lora is not None and self.source is not None:
            raise ValueError(
                "critic.lora is not read with a critic.source, whose adapter has its own; remove it"
            )
        return self


class PPOStage(PolicyStage):
    """Trains the policy on a reward: with PPO, or with TRL's RLOO or GRPO by `algorithm`."""

    stage: ClassVar[str] = "ppo"
    inputs: ClassVar = {"records": StageInput("records", "prepare"), "policy": StageInput("policy", "sft")}

    algorithm: Literal["ppo", "rloo", "grpo"] = "ppo"
    """Trainer, and class of `training`: pipeline.PPOConfig, trl.RLOOConfig or trl.GRPOConfig."""

    policy: str | None = None
    """Policy to train, an artifact, a folder or a hub id; null is the run's own `sft`."""

    reward: list[Reward] = Field([])
    """Reward to train on, or a list to sum, each a section or its source; empty is the run's own `reward`."""

    records: str | None = None
    """Prepared records: an artifact or a `save_to_disk` folder; null is the run's own `prepare`."""

    uncertainty_penalty: float = Field(0.0, ge=0)
    """Standard deviations between the rewards to subtract from their sum; needs two rewards or more."""

    gold: FunctionSection | None = None
    """Gold reward, a `module:function` or a section; it is measured at evaluations and never trained on."""

    evaluation: EvaluationSection = EvaluationSection()
    """Evaluations while PPO trains."""

    critic: CriticSection = CriticSection()
    """The critic; only read by `algorithm: ppo`."""

    rollouts: RolloutsSection | None = None
    """Servers that sample the responses; null samples in this process. Only read by `algorithm: ppo`."""

    one_backbone: Literal["auto", "always", "never"] = "auto"
    """Share the policy's backbone with a reward model on its base, under LoRA; `always` fails otherwise."""

    max_prompt_tokens: int = Field(256, gt=0)
    """Prompt limit in tokens."""

    overlong: Overlong = "truncate_left"
    """Treatment of prompts over `max_prompt_tokens`: cut the start, cut the end, or drop them;
    RLOO and GRPO always drop them."""

    _reward = field_validator("reward", mode="before")(as_rewards)
    _gold = field_validator("gold", mode="before")(from_source_string)

    @model_validator(mode="after")
    def set_defaults(self) -> "PPOStage":
        self.policy = self.policy or self.upstream("sft")
        self.reward = self.reward or [Reward(source=self.upstream("reward"))]
        self.records = self.records or self.upstream("prepare")
        return self

    def named_inputs(self) -> Iterator[tuple[str, str, StageInput]]:
        yield from super().named_inputs()
        for reward in self.reward:
            yield "reward", *reward_input(reward, "reward")
        if self.evaluation.scorer:
            yield "evaluation.scorer", *reward_input(self.evaluation.scorer)
        if self.critic.source:
            yield "critic.source", self.critic.source, StageInput("model")

    def resolved(self) -> dict[str, Any]:
        resolved = super().resolved()
        if self.critic == CriticSection():  # as artifacts have it that are older than the section
            del resolved["critic"]
        if self.rollouts is None:
            del resolved["rollouts"]
        return resolved

    @model_validator(mode="after")
    def check_rollouts(self) -> "PPOStage":
        if self.rollouts is not None:
            self.rollouts.check_stage(self.algorithm, self.lora is not None, self.adapter == "merge")
        return self

    @model_validator(mode="after")
    def check_critic(self) -> "PPOStage":
        critic = self.critic
        if self.algorithm != "ppo" and critic != CriticSection():
            raise ValueError(f"'critic:' is only read with algorithm: ppo; {self.algorithm} has no critic")
        if critic.on == "adapter" and self.lora is None:
            raise ValueError(
                "critic.on: adapter needs a policy that is trained with LoRA; add a 'lora:' section, or set "
                "critic.on: model"
            )
        if self.training.get("value_init") == "reward" and (critic.on != "trunk" or critic.source):
            raise ValueError(
                "training.value_init: reward is only for a critic on the policy's trunk without a "
                "critic.source; remove it, or name the reward model as the critic.source of critic.on: model"
            )
        return self

    @model_validator(mode="after")
    def check_overlong(self) -> "PPOStage":
        if self.algorithm != "ppo" and self.overlong == "truncate_right":
            raise ValueError(
                f"overlong: truncate_right is not for algorithm: {self.algorithm}, whose trainer cannot cut "
                "prompts; set overlong: drop"
            )
        return self

    @model_validator(mode="after")
    def check_weights(self) -> "PPOStage":
        check_sum(self.reward, self.uncertainty_penalty)
        return self

    @model_validator(mode="after")
    def check_scorer(self) -> "PPOStage":
        scorer = self.evaluation.scorer
        evaluates = self.training.get("eval_strategy", "no") not in ("no", False)
        if self.evaluation.keep and not evaluates:
            raise ValueError(
                "evaluation.keep keeps the policies of evaluations, and there are none; "
                "set training.eval_strategy: steps"
            )
        if scorer is None:
            if self.evaluation.patience != EvaluationSection().patience:  # a resolved config names all keys
                raise ValueError(
                    "evaluation.patience is only read with an evaluation.scorer; name one, or remove it"
                )
            return self
        check_scorer_keys("evaluation.scorer", scorer)
        if not evaluates:
            raise ValueError(
                "evaluation.scorer scores evaluations, and there are none; set training.eval_strategy: steps"
            )
        if (scorer.source, scorer.arguments) in [(reward.source, reward.arguments) for reward in self.reward]:
            raise ValueError(
                f"evaluation.scorer: {scorer.source} is what PPO is trained on; name a held-out one"
            )
        return self
