"""`RewardModel`: the reader of a reward artifact. What it returns is what plain `transformers` computes, times `alpha`.

The artifact is a sequence-classification checkpoint plus `reward.json`, which holds `Settings`.
"""

import dataclasses
import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import hub
from pipeline.data.schema import Text
from pipeline.distributed.processes import map_across_processes
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError
from pipeline.models.chat import PLAIN_TEMPLATE, completion_text
from pipeline.models.loading import (
    explain_load_errors,
    is_adapter,
    load_classifier,
    load_tokenizer,
    max_positions,
)
from pipeline.reward import batching
from pipeline.reward.encoding import Encoding, encode_response
from pipeline.reward.encoding import check_encoding as check_encoding
from pipeline.reward.settings import SETTINGS, RewardSettings

logger = logging.getLogger(__name__)


class RewardModel:
    """Scores answers. Build one with `load`; higher is better.

    >>> from pipeline import RewardModel
    >>> rm = RewardModel.load("runs/demo/reward")
    >>> answers = ["An apple.", "No.", "A carrot."]
    >>> scores = rm.score(["Name a fruit."] * 3, answers)
    >>> rm.rank("Name a fruit.", answers) == sorted(range(3), key=lambda i: -scores[i])
    True
    >>> rm.best_of_n("Name a fruit.", answers)[1] == max(scores)
    True
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, settings: RewardSettings
    ):
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings
        batching.check_padding(model, tokenizer.pad_token_id, str(model.name_or_path))
        self._shares = batching.supports_prefix_sharing(
            model, tokenizer.pad_token_id, settings.encoding.max_length
        )

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        positive_label: str | None = None,
        encoding: dict[str, Any] | None = None,
        precision: str = "fp32",
        device: str | torch.device | None = None,
        model: Any = None,
        **options: Any,
    ) -> "RewardModel":
        """Open a reward artifact, or a foreign sequence classifier (no `reward.json`), whose reading it logs.

        Of a foreign classifier with several labels the logit of `positive_label` is the reward; `encoding` (keys of `Encoding`) says how it
        reads where its defaults are wrong. `model` is the classifier, where it is in memory already. Raises `UserError` where `source` is
        no such checkpoint.
        """
        found = hub.fetch_file(str(source), SETTINGS, options.get("revision"))
        settings = RewardSettings.load(found.parent) if found else None
        tokenizer = load_tokenizer(str(source), generates=False, distinct_pad=False, **options)
        if model is None:
            model = _load(str(source), tokenizer, settings, precision, options)
            if settings is None or settings.quantization == "none":
                model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        settings = settings or _external_settings(str(source), model, tokenizer)
        read = _override_settings(str(source), model, settings, positive_label, encoding)
        if read != settings:
            read.reward_mean = read.reward_std = read.length_mean = read.length_slope = (
                None  # those of another reward
            )
        check_encoding(tokenizer, read.encoding, str(source), max_positions(model))
        return cls(model, tokenizer, read)

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

        len(result) = len(prompts). `alpha` defaults to the artifact's own. Neither order nor `batch_size` changes a score.
        """
        raw = self.settings.reward(self.logits(prompts, responses, batch_size=batch_size)).tolist()
        if normalize:
            if self.settings.reward_mean is None or self.settings.reward_std is None:
                raise UserError(
                    "score: no reference sample is known for this reading of the model, so that it cannot be normalized"
                )
            raw = [(value - self.settings.reward_mean) / self.settings.reward_std for value in raw]
        return [(self.settings.alpha if alpha is None else alpha) * value for value in raw]

    def score_response(self, prompt: Text, response: Text) -> float:
        """The score of one response."""
        return self.score([prompt], [response])[0]

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Text], responses: Sequence[Text], *, batch_size: int = 64) -> Tensor:
        """(N, C) fp32 on the CPU: what the head gives, of a scalar model (N, 1)."""
        if len(prompts) != len(responses):
            raise UserError(
                f"score: {len(prompts)} prompts but {len(responses)} responses; expected as many of one as of the other"
            )
        if not prompts:
            return torch.zeros(0, self.model.config.num_labels)
        return self._logits(prompts, responses, batch_size)

    def _logits(self, prompts: Sequence[Text], responses: Sequence[Text], batch_size: int) -> Tensor:
        encoded = [
            encode_response(self.tokenizer, self.settings.encoding, p, r)
            for p, r in zip(prompts, responses, strict=True)
        ]
        # Answers to one prompt, wherever they stand, are a group.
        order = sorted(range(len(prompts)), key=lambda i: str(prompts[i]))
        groups = [[encoded[i] for i in group] for _, group in groupby(order, key=lambda i: str(prompts[i]))]
        types = "token_type_ids" in self.tokenizer.model_input_names
        found = batching.compute_logits(
            self.model,
            groups,
            self.tokenizer.pad_token_id,
            shared=self._shares,
            batch_size=batch_size,
            types=types,
        )
        return found[torch.tensor(order).argsort().to(found.device)].float().cpu()

    def lengths(self, responses: Sequence[Text]) -> list[int]:
        """How many tokens each response has."""
        return [
            len(self.tokenizer(completion_text(each), add_special_tokens=False, verbose=False)["input_ids"])
            for each in responses
        ]

    def probabilities(self, prompts: Sequence[Text], responses: Sequence[Text]) -> list[dict[str, float]]:
        """For each response {class: softmax probability}. Raises `UserError` where the model has one output."""
        if self.model.config.num_labels == 1:
            raise UserError("probabilities: this reward model gives a scalar, not classes; use score")
        found = self.logits(prompts, responses).softmax(1).tolist()
        return [dict(zip(_labels(self.model), row, strict=True)) for row in found]

    def rank(self, prompt: Text, responses: Sequence[Text]) -> list[int]:
        """Indices of `responses`, best first; ties keep their order."""
        scores = self.score([prompt] * len(responses), responses)
        return sorted(range(len(scores)), key=lambda i: -scores[i])

    def best_of_n(self, prompt: Text, responses: Sequence[Text]) -> tuple[int, float]:
        """(index, score) of the best response."""
        scores = self.score([prompt] * len(responses), responses)
        best = max(range(len(scores)), key=scores.__getitem__)
        return best, scores[best]


AT_A_TIME = 512  # answers between two moves of the bar


class DistributedRewardModel(RewardModel):
    """One that every process has loaded: each computes its share. To be called by all of them, with the same."""

    def logits(self, prompts: Sequence[Text], responses: Sequence[Text], *, batch_size: int = 64) -> Tensor:
        def share(rows: Sequence[int]) -> list[list[float]]:
            found: list[list[float]] = []
            with progress_bar("scoring", "answers", total=len(rows)) as shown:
                for start in range(0, len(rows), AT_A_TIME):
                    mine = (
                        [texts[row] for row in rows[start : start + AT_A_TIME]]
                        for texts in (prompts, responses)
                    )
                    found += super(DistributedRewardModel, self).logits(*mine, batch_size=batch_size).tolist()
                    shown.update(len(found) - start)
            return found

        return torch.tensor(map_across_processes(share, range(len(prompts)))).reshape(
            len(prompts), self.model.config.num_labels
        )


def _load(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: RewardSettings | None,
    precision: str,
    options: dict[str, Any],
) -> Any:
    weights: dict[str, Any] = {
        "quantization": settings.quantization if settings else "none",
        "precision": precision,
    }
    revision = options.get("revision")
    if not is_adapter(source, revision):
        return load_classifier(source, tokenizer, **weights, **options)
    # Trained on a quantized base: the artifact is the adapter, and the head.
    with explain_load_errors(source, "LoRA adapter of a sequence classifier"):
        adapter = PeftConfig.from_pretrained(source, revision=revision)
    if adapter.task_type not in (None, TaskType.SEQ_CLS):
        raise UserError(
            f"{source}: is an adapter of task {adapter.task_type}; a reward needs one of {TaskType.SEQ_CLS.value}"
        )
    options = options | {"revision": adapter.revision, "head": (settings or RewardSettings()).head}
    base: Any = load_classifier(str(adapter.base_model_name_or_path), tokenizer, **weights, **options)
    with explain_load_errors(source, "LoRA adapter of a sequence classifier"):
        return PeftModel.from_pretrained(base, source, revision=revision)


def _external_settings(source: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> RewardSettings:
    """How a classifier without `reward.json` is read; of several labels none is the reward yet (-1)."""
    is_decoder = batching.score_head(model) is not None
    limit = min(tokenizer.model_max_length, max_positions(model) or 512, 512)
    has_template = tokenizer.chat_template != PLAIN_TEMPLATE.format(
        separator="\n"
    )  # what `load_tokenizer` gives one without
    form = (
        "pair"
        if not is_decoder and tokenizer.is_fast
        else "chat"
        if is_decoder and has_template
        else "concatenation"
    )
    how = Encoding(form=form, eos=form == "chat", max_length=limit)
    objective = "classification" if model.config.num_labels > 1 else "regression"
    logger.warning(
        "%s: no reward.json; read with %s; another reading: RewardModel.load(…, encoding={…})", source, how
    )
    return RewardSettings(
        objective=objective,
        outputs=_labels(model),
        encoding=how,
        logit=0 if model.config.num_labels == 1 else -1,
    )


def _override_settings(
    source: str,
    model: Any,
    settings: RewardSettings,
    positive_label: str | None,
    encoding: dict[str, Any] | None,
) -> RewardSettings:
    """The settings with what the user asks for in their place."""
    try:
        found = dataclasses.replace(
            settings, encoding=dataclasses.replace(settings.encoding, **encoding or {})
        )
    except TypeError:
        known = ", ".join(each.name for each in dataclasses.fields(Encoding))
        raise UserError(f"encoding={encoding}: expected a dict with keys of {known}") from None
    if positive_label is not None:
        found.logit = _label_index(source, model, positive_label)
    elif settings.logit < 0:
        raise UserError(
            f"{source}: has the labels {_labels(model)} and no reward.json; say which one is good: positive_label=…"
        )
    return found


def _labels(model: Any) -> list[str]:
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def _label_index(source: str, model: Any, name: str) -> int:
    if name not in _labels(model):
        raise UserError(
            f"{source}: positive_label={name!r} is none of its labels: {', '.join(_labels(model))}"
        )
    return _labels(model).index(name)
