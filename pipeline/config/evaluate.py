"""The evaluate stage's keys."""

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Overlong, Precision, Quantization, StageConfig, StageInput
from pipeline.config.reward import (
    FunctionSection,
    Reward,
    as_rewards,
    check_scorer_keys,
    check_sum,
    from_source_string,
    reward_input,
)
from pipeline.config.rollouts import EngineSection

# The metrics of a policy: no measure may have one of these names, or one as a win rate or interval has.
POLICY_METRICS = {
    *("gold_reward", "scorer_reward", "well_formed", "reward", "kl", "kl_bound", "response_tokens"),
    *("ended_fraction", "distinct_1", "distinct_2", "reward_length_correlation", "prompts"),
}
WIN_RATE = "win_rate"
INTERVAL = "_interval"
OTHER_COLUMNS = {"prompt", "text", "ids", "ended", "name", "line", "bound"}  # of tables that hold metrics


class EvaluateStage(StageConfig):
    """Compares PPO's policy with SFT's, and with best-of-n, on held-out prompts.

    A figure whose scorer is not named is omitted.
    """

    stage: ClassVar[str] = "evaluate"
    inputs: ClassVar = {
        "records": StageInput("records", "prepare"),
        "sft": StageInput("policy", "sft"),
        "ppo": StageInput("policy", "ppo"),
    }

    records: str | None = None
    """Prepared records: an artifact or a `save_to_disk` folder; null is the run's own `prepare`."""

    sft: str | None = None
    """Policy before PPO, an artifact, a folder or a hub id; null is the run's own `sft`."""

    reward: list[Reward] = Field([])
    """Reward to compare by, or a list to sum; empty is what the run's `ppo` was trained on, or the run's
    `reward` for another `ppo`."""

    uncertainty_penalty: float = Field(0.0, ge=0)
    """Standard deviations between the rewards to subtract from their sum; PPO's if `reward` is empty."""

    ppo: str | None = None
    """Policy after PPO, an artifact, a folder or a hub id; null is the run's own `ppo`."""

    positive_label: str | None = None
    """Label whose logit is the reward, for a classifier with several labels that no reward stage trained."""

    scorer: Reward | None = None
    """Held-out reward that PPO was not trained on."""

    gold: FunctionSection | None = None
    """Gold reward, a `module:function` or a section."""

    well_formed: FunctionSection | None = None
    """A `module:function` or a section, which returns 1 for a well-formed response and 0 for others."""

    measures: dict[str, FunctionSection] = Field({})
    """More functions whose mean over responses is reported for each policy: name -> `module:function`, or a
    section."""

    prompts: int = Field(100, gt=0)
    """Maximum number of test prompts."""

    samples_per_prompt: int = Field(4, gt=0)
    """Responses that PPO's policy generates for each prompt."""

    best_of: int = Field(16, gt=1)
    """Responses that SFT's policy generates for each prompt, for best-of-n up to this n."""

    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of both policies."""

    response_tokens: int = Field(48, gt=0)
    """Maximum new tokens of a response."""

    max_prompt_tokens: int = Field(256, gt=0)
    """Prompt limit in tokens."""

    overlong: Overlong = "truncate_left"
    """Treatment of prompts over `max_prompt_tokens`: cut the start, cut the end, or drop them."""

    batch_size: int = Field(64, gt=0)
    """Responses that are generated or scored together."""

    rollouts: EngineSection | None = None
    """Servers that sample the responses; null samples in this process."""

    quantization: Quantization = "none"
    """Quantize the weights of both policies with bitsandbytes; a reward artifact has its own."""

    precision: Precision = "fp32"
    """Dtype of both policies; `auto` is bf16 on a GPU that supports it, else fp32."""

    trust_remote_code: bool = False
    """Run model code that comes with a hub repository."""

    _reward = field_validator("reward", mode="before")(as_rewards)
    _functions = field_validator("scorer", "gold", "well_formed", mode="before")(from_source_string)

    def named_inputs(self) -> Iterator[tuple[str, str, StageInput]]:
        yield from super().named_inputs()
        for reward in self.reward:
            yield "reward", *reward_input(reward, "reward")
        if self.scorer:
            yield "scorer", *reward_input(self.scorer)

    def resolved(self) -> dict[str, Any]:
        resolved = super().resolved()
        plain = [Reward(source=reward.source).model_dump(mode="json") for reward in self.reward]
        if len(plain) == 1 and resolved["reward"] == plain:  # as artifacts have it that are older than lists
            resolved["reward"] = self.reward[0].source
        if not self.uncertainty_penalty:
            del resolved["uncertainty_penalty"]
        if not self.measures:  # as artifacts have it that are older than the key
            del resolved["measures"]
        if self.rollouts is None:
            del resolved["rollouts"]
        return resolved

    @field_validator("measures", mode="before")
    @classmethod
    def from_source_strings(cls, measures: Any) -> Any:
        if not isinstance(measures, dict):
            return measures
        return {name: from_source_string(measure) for name, measure in measures.items()}

    @field_validator("measures")
    @classmethod
    def check_measures(cls, measures: dict[str, FunctionSection]) -> dict[str, FunctionSection]:
        for name in measures:
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name of a metric; expected letters, digits and _")
            if name in POLICY_METRICS | OTHER_COLUMNS or name.startswith(WIN_RATE) or name.endswith(INTERVAL):
                raise ValueError(f"{name!r} is a name that evaluate uses already; choose another")
        return measures

    @model_validator(mode="after")
    def set_defaults(self) -> "EvaluateStage":
        self.records = self.records or self.upstream("prepare")
        self.sft = self.sft or self.upstream("sft")
        self.ppo = self.ppo or self.upstream("ppo")
        if not self.reward and not self.reads("ppo"):
            self.reward = [Reward(source=self.upstream("reward"))]
        check_sum(self.reward, self.uncertainty_penalty)
        if self.scorer:
            check_scorer_keys("scorer", self.scorer)
        return self
