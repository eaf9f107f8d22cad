"""Base classes of the stages' configs: strict sections, the run and the seed, training, and a starting model.

The string below a key describes it; `rlhf config`, docs/configuration.md and configs/schemas/ print it.
`pipeline.training` checks the keys under `training:` and `lora:`, which belong to the libraries' own classes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from pipeline.config.values import check_values

Quantization = Literal["none", "8bit", "4bit"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Overlong = Literal["truncate_left", "truncate_right", "drop"]
NOT_FINGERPRINTED = (
    "report_to",
    "run_name",
    "disable_tqdm",
)  # keys of `training:` that change where figures go, not the result

# Values of lora.init_lora_weights with which PEFT leaves the base as it is; the others change its weights.
BASE_FREE_INITS = (True, False, "gaussian")


class StageInput(NamedTuple):
    """An input of a stage: its kind of artifact, and the stage that makes it ("" if no stage does)."""

    kind: str
    stage: str = ""


class StrictModel(BaseModel):
    """A section that refuses unknown keys, numbers that are not finite, and credentials."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # it may contain a password
    )

    @model_validator(mode="before")
    @classmethod
    def check_plain(cls, values: Any) -> Any:
        check_values(values)
        return values


class Scratch(StrictModel):
    """A small randomly initialized model, whose byte-level BPE tokenizer is trained on the prepared text."""

    architecture: str = "gpt2"
    """Model type of transformers; a policy is always a `gpt2`, a reward model can be any."""

    layers: int = Field(4, gt=0)
    """Number of transformer layers."""

    width: int = Field(128, gt=0)
    """Hidden size, a multiple of `heads`."""

    heads: int = Field(4, gt=0)
    """Number of attention heads."""

    vocabulary: int = Field(512, ge=257)
    """Vocabulary size of the tokenizer in tokens, with the 256 bytes and the special tokens."""

    positions: int = Field(128, gt=0)
    """Longest sequence the model can read, in tokens; without a `scratch` section it is `max_length`."""

    @model_validator(mode="after")
    def check_heads(self) -> "Scratch":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        return self


class StageConfig(StrictModel):
    """The keys of every stage: the run it belongs to and the seed."""

    stage: ClassVar[str]
    inputs: ClassVar[dict[str, StageInput]] = {}  # by the key that names the source

    run: str = Field(pattern=r"^\w[\w.-]*$")
    """Name of the run; in a recipe it defaults to the name of the recipe's folder."""

    runs: str = "runs"
    """Folder that holds the runs; the stage writes to `<runs>/<run>/<stage>`."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything random in the stage."""

    force: bool = False
    """Run the stage even if nothing changed, and discard a partial run."""

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

    def make_command(self, stage: str) -> str:
        """Return the command that makes the artifact of `stage`."""
        return f"{self.command} --until {stage}"

    def upstream(self, stage: str) -> str:
        """Return the folder of another stage of the same run."""
        return str(Path(self.runs) / self.run / stage)

    def named_inputs(self) -> Iterator[tuple[str, str, StageInput]]:
        """Yield the key, the source and the kind of each input that the config names."""
        for key, declared in self.inputs.items():
            yield key, getattr(self, key), declared

    def reads(self, stage: str) -> bool:
        """Return whether an input is the artifact of another stage of the same run, or inside it."""
        folder = Path(self.upstream(stage)).resolve()
        return any(Path(source).resolve().is_relative_to(folder) for _, source, _ in self.named_inputs())

    def resolved(self) -> dict[str, Any]:
        """Return everything that decides the result, as plain data."""
        return self.model_dump(mode="json", exclude={"force"})


class TrainedStage(StageConfig):
    """A stage that trains a model with a trainer of the libraries."""

    quantization: Quantization = "none"
    """Quantize the base's frozen weights with bitsandbytes; needs a `lora` section."""

    precision: Precision = "auto"
    """Dtype of the computation; `auto` is bf16 on a GPU that supports it, else fp32."""

    lora: dict[str, Any] | None = None
    """Train a LoRA adapter with these arguments of peft.LoraConfig; null trains all weights."""

    training: dict[str, Any] = {}
    """Arguments of the trainer's own class."""

    trust_remote_code: bool = False
    """Run model code that comes with a hub repository."""

    def resolved(self) -> dict[str, Any]:
        resolved = super().resolved()
        fingerprinted = {
            key: value for key, value in resolved["training"].items() if key not in NOT_FINGERPRINTED
        }
        return resolved | {"training": fingerprinted}

    @model_validator(mode="after")
    def check_quantization(self) -> "TrainedStage":
        if self.quantization != "none" and self.lora is None:
            raise ValueError(
                f"quantization: {self.quantization} needs a 'lora:' section (quantized weights cannot be "
                "trained); try lora.r=16"
            )
        return self


class PolicyStage(TrainedStage):
    """A trained stage that publishes a policy: all of it, its LoRA adapter, or the merged model."""

    merge: bool = False
    """Under LoRA, publish the merged model with the adapter in `adapter/`, instead of the adapter alone."""

    adapter: Literal["continue", "merge"] = "continue"
    """If the starting model is a LoRA adapter, train it further, or merge it into its base first."""

    def resolved(self) -> dict[str, Any]:
        resolved = super().resolved()
        if self.adapter == "continue":  # as artifacts have it that are older than the key
            del resolved["adapter"]
        return resolved

    @model_validator(mode="after")
    def check_adapter(self) -> "PolicyStage":
        if self.adapter == "merge" and self.lora is not None and not self.merge:
            raise ValueError(
                "adapter: merge with a 'lora:' section trains an adapter whose base exists in memory only; "
                "set merge: true, or remove the 'lora:' section to train all weights"
            )
        return self

    @model_validator(mode="after")
    def check_merge(self) -> "PolicyStage":
        if self.merge and self.lora is None:
            raise ValueError(
                "merge: true is only read with a 'lora:' section; without one the whole model is written "
                "anyway"
            )
        if self.merge and self.quantization != "none":
            raise ValueError(
                f"merge: true: an adapter merges into a base with quantization: {self.quantization} only "
                "approximately; set merge: false"
            )
        return self


class ModelStage(TrainedStage):
    """A trained stage that starts from `model`."""

    model: str
    """Model to start from: a hub id, a folder, or `scratch` for a small randomly initialized one."""

    revision: str | None = None
    """Branch, tag or commit of a `model` on the hub; null is its main branch."""

    scratch: Scratch | None = None
    """Size of the model; only read with `model: scratch`."""

    max_length: int = Field(512, gt=3)
    """Longest sequence in tokens, prompt and response together."""

    records: str | None = None
    """Prepared records: an artifact or a `save_to_disk` folder; null is the run's own `prepare`."""

    @model_validator(mode="after")
    def set_defaults(self) -> "ModelStage":
        self.records = self.records or self.upstream("prepare")
        return self

    @model_validator(mode="after")
    def check_scratch(self) -> "ModelStage":
        if self.scratch is not None and self.model != "scratch":
            raise ValueError(f"'scratch:' is only read with model: scratch, but model is {self.model!r}")
        if self.model == "scratch":
            if self.quantization != "none":
                raise ValueError("model: scratch cannot be quantized; set quantization: none")
            self.scratch = self.scratch or Scratch(positions=self.max_length)
            if self.max_length > self.scratch.positions:
                raise ValueError(
                    f"max_length={self.max_length} is more than the model's "
                    f"scratch.positions={self.scratch.positions}"
                )
        return self
