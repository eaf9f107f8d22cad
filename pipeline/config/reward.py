"""The reward stage's keys and objectives, and `Reward`: a reward as PPO and evaluate name it."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from pipeline.config.base import ModelStage, Overlong, StageInput, StrictModel
from pipeline.config.values import check_server_url


class Objective(NamedTuple):
    """The kind of records, whether the loss compares responses to a prompt, and the card's name for the loss.

    An objective that compares, except `pairwise`, is a function of this name in `pipeline.reward.objectives`.
    """

    kind: str
    compares: bool
    loss: str


OBJECTIVES = {
    "pairwise": Objective(
        "comparisons",
        True,
        "−log σ(chosen − rejected), Bradley and Terry 1952, as Ouyang et al. 2022 (InstructGPT)",
    ),
    "ranking": Objective(
        "rankings",
        True,
        "−log σ(better − worse) over all ordered pairs of a prompt's responses, "
        "Ouyang et al. 2022 (InstructGPT, eq. 1)",
    ),
    "plackett_luce": Objective(
        "rankings",
        True,
        "−log of the probability that the responses are chosen in order of rank, Luce 1959 and Plackett 1975",
    ),
    "classification": Objective("labels", False, "cross-entropy of the softmax over the classes"),
    "regression": Objective(
        "ratings", False, "mean squared error to the ratings, as Wang et al. 2024 (HelpSteer2)"
    ),
    "stepwise": Objective(
        "steps",
        False,
        "cross-entropy of right and wrong at the last token of each step, as Lightman et al. 2023 (PRM800K)",
    ),
}


class EncodingSection(StrictModel):
    """How a prompt and a response become token ids; see `pipeline.reward.encoding`."""

    form: Literal["chat", "pair", "concatenation"] | None = None
    """Chat template, an encoder's two segments, or one text; null is chat on decoders, pair on encoders."""

    separator: str = "\n"
    """Text between prompt and response in a concatenation, and between messages that become one text."""

    step_separator: str = Field("\n", min_length=1)
    """Text between the steps of a response; only read with stepwise."""

    eos: bool | None = None
    """End the ids with EOS; null is true on decoders, except for a pair, and false on encoders."""

    token_types: bool = True
    """Give an encoder its token type ids; false omits them."""


class RewardStage(ModelStage):
    """Trains a reward model on comparisons, rankings, labels, ratings or steps; `objective` decides which."""

    stage: ClassVar[str] = "reward"
    inputs: ClassVar = {"records": StageInput("records", "prepare"), "model": StageInput("model", "sft")}

    objective: Literal[tuple(OBJECTIVES)] = "pairwise"  # type: ignore[valid-type]
    """Training objective; it decides the loss and the kind of records."""

    encoding: EncodingSection = EncodingSection()
    """How a prompt and a response become token ids."""

    overlong: Overlong = "truncate_left"
    """Treatment of rows over `max_length`: cut the prompt's start, cut the response's end, or drop them."""

    positive_label: str | None = None
    """Label whose logit is the reward; null is the class `true` or `1`; only read with classification."""

    reward_output: Literal["logit", "log_odds", "probability"] = "logit"
    """Output of the positive label that is the reward; only read with classification."""

    class_weights: list[float] | None = None
    """Weight of each class in the loss, in the order of the classes; only read with classification."""

    aggregate: Literal["min", "product", "mean", "last"] = "min"
    """How the scores of the steps become that of the response; only read with stepwise."""

    ensemble: int = Field(1, gt=0)
    """Number of heads on one backbone, each trained on its own random subset of the rows."""

    uncertainty_penalty: float = Field(0.0, ge=0)
    """Standard deviations between the heads that are subtracted from their mean; needs an ensemble."""

    def resolved(self) -> dict[str, Any]:
        resolved = super().resolved()
        if self.objective != "stepwise":  # as artifacts have it that are older than the objective
            del resolved["aggregate"], resolved["encoding"]["step_separator"]
        return resolved

    @model_validator(mode="after")
    def check_objective_keys(self) -> "RewardStage":
        if self.objective in ("classification", "stepwise") and self.ensemble > 1:
            raise ValueError(
                "ensemble: an ensemble of heads is for objectives with one score, "
                f"not for {self.objective}; set ensemble: 1"
            )
        for name, section, default in (("aggregate", self, "min"), ("step_separator", self.encoding, "\n")):
            if self.objective != "stepwise" and getattr(section, name) != default:
                raise ValueError(
                    f"{name!r} is only read with objective: stepwise, but objective is {self.objective!r}"
                )
        if self.objective != "classification":
            for key in ("positive_label", "class_weights"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key!r} is only read with objective: classification, "
                        f"but objective is {self.objective!r}"
                    )
            if self.reward_output != "logit":
                raise ValueError(
                    "'reward_output' is only read with objective: classification, "
                    f"but objective is {self.objective!r}"
                )
        if self.uncertainty_penalty and self.ensemble == 1:
            raise ValueError(
                "'uncertainty_penalty' is only read with an ensemble of two or more; set ensemble: 4"
            )
        return self


class FunctionSection(StrictModel):
    """A Python function; a string is its source."""

    source: str
    """A `module:function`."""

    arguments: dict[str, Any] | None = None
    """Arguments with which `source` is called to make the function; null uses it as it is."""

    @model_serializer(mode="wrap")
    def as_source_string(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """Return the section as its source if that is all of it."""
        return self.source if self.arguments is None else serialize(self)


class Reward(StrictModel):
    """A reward: a model, a Python function, or a server; a string is its source."""

    source: str
    """A reward artifact, a classifier's folder, a hub id, a `module:function`, or the URL of a server."""

    arguments: dict[str, Any] | None = Field(None, exclude_if=lambda arguments: arguments is None)
    """Arguments with which a `module:function` is called to make the reward; null uses it as it is."""

    weight: float | None = None
    """Weight in the sum of the rewards; null for all of n rewards is 1/n each."""

    name: str | None = Field(None, min_length=1, exclude=True)  # does not change a score
    """Name in the log, beside other rewards; null is that of the function, or the source."""

    normalize: Literal["none", "reference", "running"] = Field("none", exclude_if=lambda how: how == "none")
    """Centre and scale the reward before its weight: by its reference sample, or by all its rewards in
    training so far."""

    clip: float | None = Field(None, gt=0, exclude_if=lambda clip: clip is None)
    """Clip the reward, if it is normalized then afterwards, to ± this, before its weight; null does not."""

    transform: Literal["none", "sigmoid"] = Field("none", exclude_if=lambda how: how == "none")
    """With `sigmoid`, the normalized reward r becomes σ(r − r_ref) before its weight; r_ref is that of a
    reference response to the same prompt."""

    references: int = Field(1, gt=0, exclude_if=lambda count: count == 1)
    """Reference responses to each prompt, over which σ is averaged; only read with `transform: sigmoid`."""

    positive_label: str | None = None
    """Label whose logit is the reward, for a classifier with several labels that no reward stage trained."""

    length_penalty: float = Field(0.0, ge=0)
    """Share of length's effect on the reward to subtract, by the reference sample's slope; 1 is all."""

    reads: str | None = None
    """Folder or hub id of the model that a URL serves; null asks the server."""

    timeout: float = Field(180.0, gt=0, le=86_400, exclude=True)  # does not change a score
    """Seconds that a request to a server may take, with all its tries."""

    @model_validator(mode="after")
    def check_arguments(self) -> "Reward":
        if self.arguments is not None and not self.is_function:
            raise ValueError(
                "'arguments' is only read with a module:function as the source, "
                f"but that is {self.source!r}; remove it"
            )
        return self

    @model_validator(mode="after")
    def check_length_penalty(self) -> "Reward":
        if self.length_penalty and self.is_function:
            raise ValueError(
                f"length_penalty: {self.source} is a function, which has no reference sample; "
                "penalise length inside the function"
            )
        return self

    @model_validator(mode="after")
    def check_normalize(self) -> "Reward":
        if self.normalize == "reference" and self.is_function:
            raise ValueError(
                f"normalize: {self.source} is a function, which has no reference sample; "
                "set normalize: running, or scale it by its weight"
            )
        return self

    @model_validator(mode="after")
    def check_transform(self) -> "Reward":
        if self.transform == "none" and self.references != 1:
            raise ValueError("'references' is only read with transform: sigmoid; set that, or remove it")
        if self.transform == "sigmoid" and self.clip is not None:
            raise ValueError("clip: transform: sigmoid is between 0 and 1 already; remove one of them")
        return self

    @model_validator(mode="after")
    def check_server_keys(self) -> "Reward":
        for key in ("reads", "timeout"):
            if key in self.model_fields_set and getattr(self, key) is not None and not self.is_url:
                raise ValueError(
                    f"{key!r} is only read with the URL of a server as the source, "
                    f"but that is {self.source!r}; remove it"
                )
        return self

    @field_validator("source")
    @classmethod
    def check_url(cls, value: str) -> str:
        is_url = value.lower().startswith(("http://", "https://"))
        return check_server_url("source", value, "REWARD") if is_url else value

    @property
    def is_shaped(self) -> bool:
        """Whether the reward is normalized, clipped or transformed before its weight."""
        return (self.normalize, self.transform, self.clip) != ("none", "none", None)

    @property
    def is_loaded(self) -> bool:
        """Whether the reward is a model in this process."""
        return not self.is_url and not self.is_function

    @property
    def is_url(self) -> bool:
        return self.source.startswith(("http://", "https://"))

    @property
    def is_function(self) -> bool:
        module, colon, name = self.source.partition(":")
        return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def from_source_string(value: Any) -> Any:
    """Return the section of a reward or function for a string, its source; return other values unchanged."""
    return {"source": value} if isinstance(value, str) else value


def as_rewards(value: Any) -> list[Any]:
    """Return a list of rewards' sections for one reward or several, each a section or its source."""
    rewards = value if isinstance(value, list) else [] if value is None else [value]
    return list(map(from_source_string, rewards))


def name_rewards(rewards: Sequence[Reward]) -> list[str]:
    """Return the names of rewards in the log: a name that two have gets their numbers."""
    names = [
        reward.name or (reward.source.rpartition(":")[2] if reward.is_function else reward.source)
        for reward in rewards
    ]
    return [f"{name}[{i}]" if names.count(name) > 1 else name for i, name in enumerate(names)]


def check_scorer_keys(key: str, scorer: Reward) -> None:
    """Refuse keys of a held-out scorer that belong to rewards of a sum. Raises `ValueError`."""
    for name in ("weight", "name", "normalize", "clip", "transform"):
        if getattr(scorer, name) not in (None, "none"):
            raise ValueError(f"{key}.{name} is not read: there is one scorer; remove it")


def check_sum(rewards: Sequence[Reward], uncertainty_penalty: float) -> None:
    """Check that rewards can be summed. Raises `ValueError`."""
    if len({reward.weight is None for reward in rewards}) > 1:
        raise ValueError(
            "reward: some have a weight and some have none; give each one, or none for their mean"
        )
    if rewards and all(reward.weight == 0 for reward in rewards):
        raise ValueError("reward: every weight is 0, so nothing is learned; give one reward another weight")
    if uncertainty_penalty and len(rewards) < 2:
        raise ValueError(
            "'uncertainty_penalty' is only read with two rewards or more; an ensemble of heads has its own"
        )


def reward_input(reward: Reward, stage: str = "") -> tuple[str, StageInput]:
    """Return what a reward is read from, for `named_inputs`; `stage` makes it by default."""
    return reward.reads or reward.source, StageInput("reward", stage)
