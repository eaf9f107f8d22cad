"""`reward.json`: how text becomes token ids, and how logits become a reward.

The types and ranges of its values are those of the fields below, and they are checked when it is read.
"""

import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

from peft import TaskType
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from pipeline.artifacts import hub
from pipeline.artifacts.schema import first_fault
from pipeline.config.base import Quantization
from pipeline.config.reward import OBJECTIVES
from pipeline.errors import UserError
from pipeline.models.loading import head_config
from pipeline.reward.encoding import Encoding

SETTINGS = "reward.json"
Output = Literal["logit", "log_odds", "probability", "ensemble"]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass
class RewardSettings:
    """The content of `reward.json`. Higher rewards are better once `sign` is applied.

    - `quantization` and `precision` are those of the weights during training.
    - `output` is computed from output number `logit`: `logit`, `log_odds` against the other outputs, or the
      softmax `probability`. `ensemble` is the mean over all outputs less `uncertainty_penalty` standard
      deviations (Coste et al. 2023).
    - With `multi_label` each output is a question of its own: its probability is the sigmoid, and its
      log-odds are its logit.
    - `reward_mean` and `reward_std` are the mean and standard deviation of the rewards on a reference sample.
    - `length_mean` is the mean length in tokens of the responses in that sample. `length_slope` is the slope
      of the reward on the length.
    - A `stepwise` model has an output for every token. The score of a step is the probability that it is
      right, and `aggregate` makes that of the response from them.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    objective: Literal[tuple(OBJECTIVES)] = "pairwise"  # type: ignore[valid-type]
    outputs: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["reward"])
    encoding: Encoding = field(default_factory=Encoding)
    quantization: Quantization = "none"
    precision: str | None = None
    output: Output = "logit"
    logit: int = 0
    multi_label: bool = False
    aggregate: Literal["min", "product", "mean", "last"] = "min"
    sign: Literal[1, -1] = 1
    uncertainty_penalty: NotNegative = 0.0
    alpha: float = 1.0
    reward_mean: float | None = None
    reward_std: NotNegative | None = None
    length_mean: NotNegative | None = None
    length_slope: float | None = None

    @property
    def is_stepwise(self) -> bool:
        """Whether the model scores the steps of a response."""
        return self.objective == "stepwise"

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads the checkpoint."""
        return AutoModelForTokenClassification if self.is_stepwise else AutoModelForSequenceClassification

    @property
    def task_type(self) -> TaskType:
        """PEFT's task of the adapter."""
        return TaskType.TOKEN_CLS if self.is_stepwise else TaskType.SEQ_CLS

    @property
    def head(self) -> dict[str, Any]:
        """The config of the head.

        Scalars have the problem type regression: transformers' `pipeline()` would apply a sigmoid otherwise.
        """
        if self.multi_label:
            return head_config(self.outputs, "multi_label_classification")
        is_classifier = self.objective in ("classification", "stepwise")
        return head_config(self.outputs, "single_label_classification" if is_classifier else "regression")

    @classmethod
    def find(cls, source: str, revision: str | None = None) -> "RewardSettings | None":
        """Load the settings of a folder or a hub id; see `load`."""
        path = hub.fetch_file(source, SETTINGS, revision)
        return cls.load(path.parent) if path else None

    @classmethod
    def load(cls, folder: Path) -> "RewardSettings | None":
        """Load the settings of `folder`, or return None if it has none.

        Raises `UserError` if they were written by another version, or altered.
        """
        path = folder / SETTINGS
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            # Models that were trained before the encoding had a `turn` keep their scores.
            turn = "template" if values.get("objective") == "stepwise" else "text"
            encoding = {"turn": turn} | values["encoding"]
            settings = READER.validate_json(json.dumps(values | {"encoding": encoding}))
            if not 0 <= settings.logit < len(settings.outputs):
                raise ValueError(f"logit: {settings.logit} is none of the {len(settings.outputs)} outputs")
        except ValidationError as error:
            raise UserError(cls._refusal(path, first_fault(error))) from None
        except KeyError as error:
            raise UserError(cls._refusal(path, f"{error} is missing")) from None
        except (ValueError, TypeError, RecursionError, UserError) as error:
            raise UserError(cls._refusal(path, str(error))) from None
        return settings

    @staticmethod
    def _refusal(path: Path, reason: str) -> str:
        return f"{path}: not a reward.json of this version: {reason}; run the reward stage again"

    def save(self, folder: Path) -> None:
        """Write `reward.json` into `folder`."""
        values = asdict(self)
        if not self.multi_label:  # no stage trains one, and an older version does not know the field
            del values["multi_label"]
        if not self.is_stepwise:
            del values["aggregate"], values["encoding"]["step_separator"]
        (folder / SETTINGS).write_text(json.dumps(values, indent=2) + "\n")

    def reward(self, logits: Tensor) -> Tensor:
        """Return the raw rewards (N,) of logits (N, C), before `alpha`."""
        if self.output == "ensemble":
            return self.sign * logits.mean(1) - self.uncertainty_penalty * logits.std(1, correction=0)
        if self.output == "probability":
            return self.sign * self.probabilities(logits)[:, self.logit]
        chosen = logits[:, self.logit]
        if self.output == "log_odds" and not self.multi_label:
            others = [i for i in range(logits.shape[1]) if i != self.logit]
            chosen = chosen - logits[:, others].logsumexp(1)
        return self.sign * chosen

    def aggregated(self, scores: Sequence[float]) -> float:
        """Return the score of a response from those of its steps, of which there is at least one."""
        return float(AGGREGATES[self.aggregate](scores))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (N, C) of logits (N, C), as transformers' `pipeline()` does."""
        return logits.sigmoid() if self.multi_label else logits.softmax(1)


# Scores of steps -> the score of the response.
AGGREGATES: dict[str, Callable[[Any], float]] = {
    "min": min,
    "product": math.prod,
    "mean": fmean,
    "last": operator.itemgetter(-1),
}
READER = TypeAdapter(RewardSettings)
