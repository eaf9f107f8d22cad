"""The prepare stage's keys: where raw rows come from, and which prompts are held out."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import StageConfig, StrictModel

WORLDS = ("demo", "sums")  # formats that are generated here

# The worlds, the kinds of records, and the published shapes of `pipeline.data.shapes.table`.
Format = Literal[
    "demo",
    "sums",
    "comparisons",
    "dialogues",
    "rankings",
    "ratings",
    "labels",
    "steps",
    "demonstrations",
    "prompts",
    "alpaca",
    "alpaca_pairs",
    "sharegpt",
    "sharegpt_pairs",
    "kto",
    "scored",
    "ultrafeedback",
    "ultrafeedback_pairs",
    "helpsteer",
    "helpsteer2_pairs",
    "helpsteer3",
    "shp",
    "nectar",
    "oasst",
    "pku_saferlhf",
    "webgpt",
    "summaries",
    "arena",
    "pandalm",
    "label_studio",
    "argilla",
]


class Source(StrictModel):
    """Where raw rows come from, and how their columns map to ours."""

    format: Format | None = None
    """Kind or shape of the rows; null finds it by their columns. `demo` and `sums` are built-in worlds."""

    path: str | None = None
    """A CSV, TSV, JSON, JSONL or Parquet file, a folder of these, or a `save_to_disk` folder."""

    hub: str | None = None
    """Dataset on the hub, instead of a `path`."""

    subset: str | None = None
    """Configuration of the hub dataset."""

    split: str | None = None
    """Only this split of a hub dataset or `save_to_disk` folder (null is train) or of a folder's files."""

    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""

    map: str | None = Field(None, exclude_if=lambda spec: spec is None)
    """A `module:function` that turns each row into a row, a list of rows, or None; `format` is theirs."""

    columns: dict[str, str | list[str]] = Field({})
    """Maps our column names to the source's; several columns are joined by a blank line."""

    values: dict[str, str | float] = Field({})
    """Gives a column the same value in every row."""

    ignore: list[str] = Field([])
    """Columns, and keys of messages, that are passed over on purpose, such as `tools`."""

    classes: list[str] | None = None
    """Names of the label classes in the order of their ids; only read with `labels`, `kto` and `demo`."""

    operations: int | None = Field(None, ge=2, le=100, exclude_if=lambda operations: operations is None)
    """Operations of each prompt of `sums`, which is the only format that reads it; null is 8."""

    limit: int | None = Field(None, gt=0)
    """Read only the first rows, at most this many."""

    @model_validator(mode="after")
    def check_origin(self) -> "Source":
        origins = [name for name in ("path", "hub") if getattr(self, name)]
        if len(origins) != (self.format not in WORLDS):
            raise ValueError(
                f"format {self.format!r} takes no path or hub"
                if self.format in WORLDS
                else "needs either 'path' or 'hub'"
            )
        return self

    @model_validator(mode="after")
    def check_unread_keys(self) -> "Source":
        has_origin = self.format not in WORLDS
        is_read = {
            "subset": self.hub,
            "revision": self.hub,
            "map": has_origin,
            "columns": has_origin,
            "values": has_origin,
            "ignore": has_origin,
            "classes": self.format in (None, "labels", "kto", "demo"),
            "operations": self.format == "sums",
        }
        for key, read in is_read.items():
            if getattr(self, key) and not read:
                origin = self.hub or self.path or f"the {self.format} world"
                how = f"with format {self.format!r} " if self.format else ""
                raise ValueError(f"{key!r} is not read {how}from {origin}; remove it")
        if len(set(self.classes or [])) < len(self.classes or []):
            raise ValueError(f"classes {self.classes} contains a duplicate; name each class once")
        return self


class Splits(StrictModel):
    """Fractions of the prompts that are held out; the rest is `train`."""

    validation: float = Field(0.1, ge=0, lt=1)
    """Fraction of the prompts that evaluations during training use."""

    test: float = Field(0.1, ge=0, lt=1)
    """Fraction of the prompts that only the final measurements use."""

    @model_validator(mode="after")
    def check_sum(self) -> "Splits":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation={self.validation} and test={self.test} leave nothing to train on; "
                "expected a sum below 1"
            )
        return self


class PrepareStage(StageConfig):
    """Reads human feedback into records and splits them by prompt; bad rows go to quarantine.jsonl."""

    stage: ClassVar[str] = "prepare"

    source: list[Source] = Field(min_length=1)
    """Raw data: one source, or a list of them."""

    splits: Splits = Splits()
    """Fractions of the prompts that are held out; the rest is `train`."""

    ties: Literal["drop", "keep"] = "drop"
    """Votes without a winner: `drop` quarantines them, `keep` counts each as half a vote for each side."""

    def resolved(self) -> dict[str, Any]:
        resolved = super().resolved()
        if self.ties == "drop":  # as artifacts have it that are older than the key
            del resolved["ties"]
        return resolved

    @field_validator("source", mode="before")
    @classmethod
    def as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value
