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
    """`reward.json`: how text becomes ids and logits become a reward. Higher is better once `sign` is applied.

    `quantization` and `precision` are those of the weights it was trained on. `output` of the output number `logit`: `logit`, `log_odds`
    against the others or softmax `probability`; `ensemble`: the mean over all outputs less `uncertainty_penalty` standard deviations
    (Coste et al. 2023). The last four are of a reference sample's answers: of their rewards, and of their tokens (the slope is that of
    the reward on the tokens).
    """

    objective: str = "pairwise"
    outputs: list[str] = field(default_factory=lambda: ["reward"])
    encoding: Encoding = field(default_factory=Encoding)
    quantization: str = "none"
    precision: str | None = None
    output: str = "logit"
    logit: int = 0
    sign: int = 1
    uncertainty_penalty: float = 0.0
    alpha: float = 1.0
    reward_mean: float | None = None
    reward_std: float | None = None
    length_mean: float | None = None
    length_slope: float | None = None

    @property
    def head(self) -> dict[str, Any]:
        """The config of the head; scalars are of problem type regression, or `pipeline()` would squash them."""
        return head_config(
            self.outputs,
            "single_label_classification" if self.objective == "classification" else "regression",
        )

    @classmethod
    def load(cls, folder: Path) -> "RewardSettings | None":
        """What `folder` holds, if anything. Raises `UserError` where it is of another version."""
        path = folder / SETTINGS
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text())
            return cls(**values | {"encoding": Encoding(**values["encoding"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: not a reward.json of this version: {error}; run the reward stage again"
            ) from None

    def save(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def reward(self, logits: Tensor) -> Tensor:
        """(N, C) logits -> (N,) raw rewards, before `alpha`."""
        if self.output == "ensemble":
            return self.sign * logits.mean(1) - self.uncertainty_penalty * logits.std(1, correction=0)
        if self.output == "probability":
            return self.sign * logits.softmax(1)[:, self.logit]
        chosen = logits[:, self.logit]
        if self.output == "log_odds":
            others = [i for i in range(logits.shape[1]) if i != self.logit]
            chosen = chosen - logits[:, others].logsumexp(1)
        return self.sign * chosen
