"""What each stage can be told: a class for each, its keys, their types and what they may not be together.

Keys under `training:` and `lora:` belong to the libraries' own classes and are checked by `pipeline.training` once these can be imported.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator


class Strict(BaseModel):
    """A section in which every key is known."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Source(Strict):
    """Where raw rows come from, and which of our columns they hold.

    `columns` maps our name to theirs (or to several of theirs, joined by a blank line), `values` gives one of ours the same value in all
    rows; `classes` names label classes in order.
    """

    format: Literal["demo", "comparisons", "dialogues", "rankings", "ratings", "labels", "demonstrations", "prompts"]
    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[str, str | list[str]] = {}
    values: dict[str, str | float] = {}
    classes: list[str] | None = None
    limit: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def one_origin(self) -> "Source":
        origins = [name for name in ("path", "hub") if getattr(self, name)]
        if len(origins) != (self.format != "demo"):
            raise ValueError("format 'demo' takes no path or hub" if self.format == "demo" else "needs either 'path' or 'hub'")
        return self

    @model_validator(mode="after")
    def nothing_unread(self) -> "Source":
        is_file = self.format != "demo"
        read = {"subset": self.hub, "revision": self.hub, "columns": is_file, "values": is_file}
        read["classes"] = self.format in ("labels", "demo")
        for key, is_read in read.items():
            if getattr(self, key) and not is_read:
                raise ValueError(
                    f"{key!r} is not read with format {self.format!r} from {self.hub or self.path or 'the demo world'}; remove it"
                )
        if len(set(self.classes or [])) < len(self.classes or []):
            raise ValueError(f"classes {self.classes} names one twice")
        return self


class Splits(Strict):
    """Fractions of the prompts held out; the rest is `train`."""

    validation: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def leave_some_to_train(self) -> "Splits":
        if self.validation + self.test >= 1:
            raise ValueError(f"validation={self.validation} and test={self.test} leave nothing to train on; expected a sum below 1")
        return self


class Scratch(Strict):
    """A small model made from nothing, for `model: scratch`; its byte-level BPE is trained on the prepared text.

    SFT makes a GPT-2; a reward model is of any `architecture` (a `model_type` of transformers).
    """

    architecture: str = "gpt2"
    layers: int = Field(4, gt=0)
    width: int = Field(128, gt=0)
    heads: int = Field(4, gt=0)
    vocabulary: int = Field(512, ge=257)
    positions: int = Field(128, gt=0)

    @model_validator(mode="after")
    def heads_divide_width(self) -> "Scratch":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        return self


class StageConfig(Strict):
    """What every stage has: the run it belongs to and the seed."""

    stage: ClassVar[str]
    run: str = Field(pattern=r"^\w[\w.-]*$")
    runs: str = "runs"
    seed: int = Field(0, ge=0, lt=2**32)
    force: bool = False

    _recipe: str | None = PrivateAttr(None)  # as `rlhf run --recipe` takes it
    _recipe_folder: Path | None = PrivateAttr(None)

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.run / self.stage

    @property
    def command(self) -> str:
        """The command that makes the whole run."""
        recipe = self._recipe or self.run
        return f"rlhf run --recipe {recipe}" + (f" --run {self.run}" if self.run != recipe else "")

    def fix(self, stage: str) -> str:
        """The command that makes what `stage` writes."""
        return f"{self.command} --until {stage}"

    def upstream(self, stage: str) -> str:
        """The folder of another stage of the same run."""
        return str(Path(self.runs) / self.run / stage)

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the result, as plain data."""
        return self.model_dump(mode="json", exclude={"force"})


class PrepareStage(StageConfig):
    stage: ClassVar[str] = "prepare"
    source: list[Source] = Field(min_length=1)
    splits: Splits = Splits()

    @field_validator("source", mode="before")
    @classmethod
    def one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value


Quantization = Literal["none", "8bit", "4bit"]
SHOWN = ("report_to", "run_name", "disable_tqdm")  # of `training:` what decides where it is told, and nothing of what is made
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class TrainedStage(StageConfig):
    """A stage that trains a model: `training` goes to the trainer's own arguments class, `lora` to `peft.LoraConfig`."""

    quantization: Quantization = "none"
    precision: Precision = "auto"
    lora: dict[str, Any] | None = None
    training: dict[str, Any] = {}
    trust_remote_code: bool = False

    def resolved(self) -> dict[str, Any]:
        resolved = super().resolved()
        return resolved | {"training": {key: value for key, value in resolved["training"].items() if key not in SHOWN}}

    @model_validator(mode="after")
    def quantized_needs_lora(self) -> "TrainedStage":
        if self.quantization != "none" and self.lora is None:
            raise ValueError(
                f"quantization: {self.quantization} needs a 'lora:' section (quantized weights cannot be trained); try lora.r=16"
            )
        return self


class PolicyStage(TrainedStage):
    """A trained stage that publishes a policy; under LoRA its adapter, or with `merge` the whole model, the adapter in `adapter/`."""

    merge: bool = False

    @model_validator(mode="after")
    def what_is_merged_is_an_adapter(self) -> "PolicyStage":
        if self.merge and self.lora is None:
            raise ValueError("merge: true is only read with a 'lora:' section; without one the whole model is written anyway")
        if self.merge and self.quantization != "none":
            raise ValueError(
                f"merge: true: a base with quantization: {self.quantization} takes an adapter in only roughly; set merge: false"
            )
        return self


class FromModel(TrainedStage):
    """A trained stage that starts from `model`: a hub id, a folder, or `scratch`."""

    model: str
    revision: str | None = None
    scratch: Scratch | None = None
    max_length: int = Field(512, gt=3)
    records: str | None = None

    @model_validator(mode="after")
    def defaults(self) -> "FromModel":
        self.records = self.records or self.upstream("prepare")
        return self

    @model_validator(mode="after")
    def scratch_goes_with_scratch(self) -> "FromModel":
        if self.scratch is not None and self.model != "scratch":
            raise ValueError(f"'scratch:' is only read with model: scratch, but model is {self.model!r}")
        if self.model == "scratch":
            if self.quantization != "none":
                raise ValueError("model: scratch cannot be quantized; set quantization: none")
            self.scratch = self.scratch or Scratch(positions=self.max_length)
            if self.max_length > self.scratch.positions:
                raise ValueError(f"max_length={self.max_length} is more than the model's scratch.positions={self.scratch.positions}")
        return self


class SFTStage(FromModel, PolicyStage):
    """`separator` ends a user turn where the tokenizer brings no chat template."""

    stage: ClassVar[str] = "sft"
    separator: str = "\n"

    @model_validator(mode="after")
    def a_policy_is_a_gpt2(self) -> "SFTStage":
        if self.scratch is not None and self.scratch.architecture != "gpt2":
            raise ValueError(f"scratch.architecture={self.scratch.architecture!r}: a policy made from nothing is a 'gpt2'")
        if self.scratch is not None and self.lora is not None:
            raise ValueError("model: scratch is trained in full, since nobody else has its base; remove the 'lora:' section")
        return self


class EncodingSection(Strict):
    """How a prompt and an answer become ids; see `pipeline.reward.encoding`. What is None is chosen by the model: an encoder reads a
    pair, a decoder a chat that ends with EOS. `token_types: false` leaves an encoder's token types out."""

    form: Literal["chat", "pair", "concatenation"] | None = None
    separator: str = "\n"
    eos: bool | None = None
    token_types: bool = True


class Objective(NamedTuple):
    """The records it learns from, whether it compares the answers to a prompt or judges each alone, and its loss, as the card tells it.

    One that compares, but for `pairwise`, is the function of its name in `pipeline.reward.objectives`, of scores, ranks and mask.
    """

    kind: str
    compares: bool
    loss: str


OBJECTIVES = {
    "pairwise": Objective("comparisons", True, "−log σ(chosen − rejected), Bradley and Terry 1952, as Ouyang et al. 2022 (InstructGPT)"),
    "ranking": Objective(
        "rankings", True, "−log σ(better − worse) over all ordered pairs of a prompt's answers, Ouyang et al. 2022 (InstructGPT, eq. 1)"
    ),
    "plackett_luce": Objective(
        "rankings", True, "−log of the chance that the answers are picked in order of rank, Luce 1959 and Plackett 1975"
    ),
    "classification": Objective("labels", False, "cross-entropy of the softmax over the classes"),
    "regression": Objective("ratings", False, "mean squared error to the ratings, as Wang et al. 2024 (HelpSteer2)"),
}


class RewardStage(FromModel):
    """`objective` says what is learned and from which records.

    `positive_label`, `reward_output` and `class_weights` belong to `classification`: which class's logit (or log-odds, or probability) is
    the reward, "true" or "1" where that is a class. An `ensemble` of several heads shares one backbone; its reward is their mean less
    `uncertainty_penalty` standard deviations.
    """

    stage: ClassVar[str] = "reward"
    objective: Literal[tuple(OBJECTIVES)] = "pairwise"  # type: ignore[valid-type]
    encoding: EncodingSection = EncodingSection()
    overlong: Literal["truncate_left", "truncate_right", "drop"] = "truncate_left"
    positive_label: str | None = None
    reward_output: Literal["logit", "log_odds", "probability"] = "logit"
    class_weights: list[float] | None = None
    ensemble: int = Field(1, gt=0)
    uncertainty_penalty: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def classes_go_with_classification(self) -> "RewardStage":
        if self.objective == "classification":
            if self.ensemble > 1:
                raise ValueError("ensemble: an ensemble of heads is for objectives with one score, not for classification; set ensemble: 1")
        else:
            for key in ("positive_label", "class_weights"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key!r} is only read with objective: classification, but objective is {self.objective!r}")
            if self.reward_output != "logit":
                raise ValueError(f"'reward_output' is only read with objective: classification, but objective is {self.objective!r}")
        if self.uncertainty_penalty and self.ensemble == 1:
            raise ValueError("'uncertainty_penalty' is only read with an ensemble of two or more; set ensemble: 4")
        return self


class Reward(Strict):
    """One of PPO's rewards: an artifact, a classifier's folder, a hub id, a `module:function`, or the URL of an engine that serves one.

    Of a foreign classifier with several labels the logit of `positive_label` is the reward. `weight` is 1/n of n where it is not given.
    `length_penalty` takes off that share (1: all) of what length alone is worth to a reward artifact, by its reference sample.
    `reads` is the folder or hub id of what a URL serves (see `pipeline.reward.remote`), `timeout` the seconds that an answer may take.
    """

    source: str
    weight: float | None = None
    positive_label: str | None = None
    length_penalty: float = Field(0.0, ge=0)
    reads: str | None = None
    timeout: float = Field(60.0, gt=0, exclude=True)  # decides no score

    @model_validator(mode="after")
    def a_function_has_no_reference_sample(self) -> "Reward":
        if self.length_penalty and self.is_function:
            raise ValueError(f"length_penalty: {self.source} is a function, of which no reference sample is known; penalise length in it")
        return self

    @model_validator(mode="after")
    def what_is_served_has_a_url(self) -> "Reward":
        for key in ("reads", "timeout"):
            if key in self.model_fields_set and getattr(self, key) is not None and not self.is_url:
                raise ValueError(f"{key!r} is only read with the URL of a server as the source, but that is {self.source!r}; remove it")
        return self

    @field_validator("source")
    @classmethod
    def a_url_tells_where_alone(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https"):
            return value
        if not parts.hostname or parts.username or parts.query or parts.fragment:
            raise ValueError(
                f"source: {parts.scheme}://{parts.hostname or ''}…: expected http://host:port alone; a key goes into the environment as "
                "REWARD_API_KEY"
            )
        return value.rstrip("/")

    @property
    def is_loaded(self) -> bool:
        """Whether it is a model in this process."""
        return not self.is_url and not self.is_function

    @property
    def is_url(self) -> bool:
        return self.source.startswith(("http://", "https://"))

    @property
    def is_function(self) -> bool:
        module, colon, name = self.source.partition(":")
        return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def named_by_text(value: Any) -> Any:
    """A reward's section, of which the source alone may be given."""
    return {"source": value} if isinstance(value, str) else value


class Watch(Strict):
    """What looks on while PPO trains: `scorer`, a reward that it is not trained on. After `patience` evaluations in a row without a new
    best of it the run stops; `best/` holds the best. `keep` keeps each evaluation's policy too, for `evaluate` to measure."""

    scorer: Reward | None = None
    patience: int = Field(3, gt=0)
    keep: bool = False

    _scorer = field_validator("scorer", mode="before")(named_by_text)


class PPOStage(PolicyStage):
    """`algorithm` says whose trainer it is and whose `training:`: `pipeline.PPOConfig`, `trl.RLOOConfig` or `trl.GRPOConfig`.

    `policy` and `reward` default to the run's own artifacts. Of several rewards, each named as text or as a section of its own, the
    weighted sum counts, less `uncertainty_penalty` standard deviations between them. `gold` is a `module:function`, used to evaluate, never
    to train. Under LoRA a reward model on the policy's base shares it (`one_backbone`): `auto` where it can, `always` or an error, `never`.
    """

    stage: ClassVar[str] = "ppo"
    algorithm: Literal["ppo", "rloo", "grpo"] = "ppo"
    policy: str | None = None
    reward: list[Reward] = []
    records: str | None = None
    uncertainty_penalty: float = Field(0.0, ge=0)
    gold: str | None = None
    evaluation: Watch = Watch()
    one_backbone: Literal["auto", "always", "never"] = "auto"
    max_prompt_tokens: int = Field(256, gt=0)

    @field_validator("reward", mode="before")
    @classmethod
    def one_or_many(cls, value: Any) -> Any:
        given = value if isinstance(value, list) else [] if value is None else [value]
        return list(map(named_by_text, given))

    @model_validator(mode="after")
    def defaults(self) -> "PPOStage":
        self.policy = self.policy or self.upstream("sft")
        self.reward = self.reward or [Reward(source=self.upstream("reward"))]
        self.records = self.records or self.upstream("prepare")
        return self

    @model_validator(mode="after")
    def weights_for_all_or_none(self) -> "PPOStage":
        if len({each.weight is None for each in self.reward}) > 1:
            raise ValueError("reward: some have a weight and some have none; give each one, or none for their mean")
        if all(each.weight == 0 for each in self.reward):
            raise ValueError("reward: every weight is 0, which leaves nothing to learn from; give one another weight")
        if self.uncertainty_penalty and len(self.reward) == 1:
            raise ValueError("'uncertainty_penalty' is only read with two rewards or more; an ensemble of heads holds its own")
        return self

    @model_validator(mode="after")
    def a_scorer_looks_on(self) -> "PPOStage":
        watched = self.training.get("eval_strategy", "no") not in ("no", False)
        if self.evaluation.keep and not watched:
            raise ValueError("evaluation.keep keeps the policies of evaluations, and there are none; set training.eval_strategy: steps")
        if self.evaluation.scorer is None and self.evaluation.patience != Watch().patience:  # a resolved config names all keys
            raise ValueError("evaluation.patience is only read with an evaluation.scorer; name one, or remove it")
        if self.evaluation.scorer is not None:
            if self.evaluation.scorer.weight is not None:
                raise ValueError("evaluation.scorer.weight is not read: a scorer looks on alone; remove it")
            if not watched:
                raise ValueError("evaluation.scorer looks on at evaluations, and there are none; set training.eval_strategy: steps")
            if self.evaluation.scorer.source in [each.source for each in self.reward]:
                raise ValueError(f"evaluation.scorer: {self.evaluation.scorer.source} is what PPO is trained on; name one that it is not")
        return self


class EvaluateStage(StageConfig):
    """On at most `prompts` test prompts: `samples_per_prompt` answers from PPO, `best_of` from SFT, both loaded with this `quantization`
    and `precision` (a reward artifact knows its own).

    `gold` and `well_formed` are `module:function` scorers, `scorer` a reward that PPO was not trained on; where absent the
    figures that need them are left out.
    """

    stage: ClassVar[str] = "evaluate"
    records: str | None = None
    sft: str | None = None
    reward: str | None = None
    ppo: str | None = None
    positive_label: str | None = None
    scorer: Reward | None = None
    gold: str | None = None
    well_formed: str | None = None
    prompts: int = Field(100, gt=0)
    samples_per_prompt: int = Field(4, gt=0)
    best_of: int = Field(16, gt=1)
    temperature: float = Field(1.0, gt=0)
    response_tokens: int = Field(48, gt=0)
    max_prompt_tokens: int = Field(256, gt=0)
    batch_size: int = Field(64, gt=0)
    quantization: Quantization = "none"
    precision: Precision = "fp32"
    trust_remote_code: bool = False

    _scorer = field_validator("scorer", mode="before")(named_by_text)

    @model_validator(mode="after")
    def defaults(self) -> "EvaluateStage":
        for name, stage in (("records", "prepare"), ("sft", "sft"), ("reward", "reward"), ("ppo", "ppo")):
            setattr(self, name, getattr(self, name) or self.upstream(stage))
        return self


STAGES: dict[str, type[StageConfig]] = {cls.stage: cls for cls in (PrepareStage, SFTStage, RewardStage, PPOStage, EvaluateStage)}
