"""`RewardModel`: the reader of a reward artifact. What it returns is what plain `transformers` computes, times `alpha`.

The artifact is a sequence-classification checkpoint plus `reward.json`, which holds `Settings`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import add
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import encoding, models
from pipeline.encoding import Text
from pipeline.errors import UserError

SETTINGS = "reward.json"


@dataclass
class Settings:
    """`reward.json`: how text becomes ids and logits become a reward. Higher is better once `sign` is applied."""

    objective: str = "pairwise"
    max_length: int = 512
    quantization: str = "none"
    logit: int = 0
    sign: int = 1
    alpha: float = 1.0
    reward_mean: float = 0.0
    reward_std: float = 1.0

    def save(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=2) + "\n")


class RewardModel:
    """Scores answers. Build one with `load`; higher is better."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, settings: Settings):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings

    @classmethod
    def load(
        cls, source: str | Path, *, precision: str = "fp32", device: str | torch.device | None = None, **options: Any
    ) -> "RewardModel":
        """Open a reward artifact, or a foreign one-logit classifier (no `reward.json`) with the defaults of `Settings`.

        Raises `UserError` where `source` is no such checkpoint.
        """
        folder = Path(source)
        settings = _read(folder / SETTINGS) if (folder / SETTINGS).is_file() else Settings()
        tokenizer = models.load_tokenizer(str(source), **options)
        weights: dict[str, Any] = {"quantization": settings.quantization, "precision": precision}
        if models.is_adapter(folder):  # trained on a quantized base: the artifact is the adapter, and the head
            base = PeftConfig.from_pretrained(str(folder))
            options |= {"revision": base.revision, "new_head": True}
            model: Any = models.load_classifier(str(base.base_model_name_or_path), tokenizer, **weights, **options)
            model = PeftModel.from_pretrained(model, str(folder))
        else:
            model = models.load_classifier(str(source), tokenizer, **weights, **options)
        if settings.quantization == "none":
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, tokenizer, settings)

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        *,
        alpha: float | None = None,
        normalize: bool = False,
        batch_size: int = 64,
    ) -> list[float]:
        """`alpha` × raw reward of each (prompt, response); `normalize` centres and scales it on the reference sample first.

        len(result) = len(prompts). `alpha` defaults to the artifact's own.
        """
        if len(prompts) != len(responses):
            raise UserError(f"score: {len(prompts)} prompts but {len(responses)} responses; expected as many of one as of the other")
        rows = [add(*encoding.encode(self.tokenizer, p, r, self.settings.max_length)) for p, r in zip(prompts, responses, strict=True)]
        raw = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: little padding
        for start in range(0, len(rows), batch_size):
            chunk = order[start : start + batch_size]
            for i, value in zip(chunk, self._forward([rows[i] for i in chunk]), strict=True):
                raw[i] = value
        if normalize:
            raw = [(value - self.settings.reward_mean) / self.settings.reward_std for value in raw]
        return [(self.settings.alpha if alpha is None else alpha) * value for value in raw]

    def rank(self, prompt: Text, responses: Sequence[Text]) -> list[int]:
        """Indices of `responses`, best first; ties keep their order."""
        scores = self.score([prompt] * len(responses), responses)
        return sorted(range(len(scores)), key=lambda i: -scores[i])

    def best_of_n(self, prompt: Text, responses: Sequence[Text]) -> tuple[int, float]:
        """(index, score) of the best response."""
        scores = self.score([prompt] * len(responses), responses)
        best = max(range(len(scores)), key=scores.__getitem__)
        return best, scores[best]

    def _forward(self, rows: list[list[int]]) -> list[float]:
        ids, mask = encoding.pad(rows, self.tokenizer.pad_token_id)
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        return (self.settings.sign * logits[:, self.settings.logit].float()).tolist()


def _read(path: Path) -> Settings:
    try:
        return Settings(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a reward.json of this version: {error}; run the reward stage again") from None
