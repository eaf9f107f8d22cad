"""`reward.json`: how text becomes token ids, and how logits become a reward."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.loading import head_config
from pipeline.reward.encoding import Encoding

SETTINGS = "reward.json"


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
    """

    objective: str = "pairwise"
    outputs: list[str] = field(default_factory=lambda: ["reward"])
    encoding: Encoding = field(default_factory=Encoding)
    quantization: str = "none"
    precision: str | None = None
    output: str = "logit"
    logit: int = 0
    multi_label: bool = False
    sign: int = 1
    uncertainty_penalty: float = 0.0
    alpha: float = 1.0
    reward_mean: float | None = None
    reward_std: float | None = None
    length_mean: float | None = None
    length_slope: float | None = None

    @property
    def head(self) -> dict[str, Any]:
        """The config of the head.

        Scalars have the problem type regression: transformers' `pipeline()` would apply a sigmoid otherwise.
        """
        if self.multi_label:
            return head_config(self.outputs, "multi_label_classification")
        is_classifier = self.objective == "classification"
        return head_config(self.outputs, "single_label_classification" if is_classifier else "regression")

    @classmethod
    def load(cls, folder: Path) -> "RewardSettings | None":
        """Load the settings of `folder`, or return None if it has none.

        Raises `UserError` if they were written by another version.
        """
        path = folder / SETTINGS
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            # Models that were trained before the encoding had a `turn` keep their scores.
            return cls(**values | {"encoding": Encoding(**{"turn": "text"} | values["encoding"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: not a reward.json of this version: {error}; run the reward stage again"
            ) from None

    def save(self, folder: Path) -> None:
        """Write `reward.json` into `folder`."""
        values = asdict(self)
        if not self.multi_label:  # no stage trains one, and an older version does not know the field
            del values["multi_label"]
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

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (N, C) of logits (N, C), as transformers' `pipeline()` does."""
        return logits.sigmoid() if self.multi_label else logits.softmax(1)
