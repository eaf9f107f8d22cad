"""`RewardModel`: loads a reward artifact and scores responses.

Its scores are what plain `transformers` computes, times `alpha`. The artifact is a sequence-classification
checkpoint plus `reward.json`, which contains `RewardSettings`.
"""

import dataclasses
import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import hub
from pipeline.data.schema import Text
from pipeline.data.texts import check_count, check_text, check_texts
from pipeline.distributed.processes import map_across_processes
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError, explain_row
from pipeline.models.adapters import is_adapter, read_adapter
from pipeline.models.chat import response_text, text_ids
from pipeline.models.load_errors import explain_load_errors
from pipeline.models.loading import load_classifier, load_tokenizer, settle_trust
from pipeline.models.positions import max_positions, mixing_limit
from pipeline.models.templates import fixed_date, is_plain
from pipeline.reward import batching, probes
from pipeline.reward.encoding import Encoded, Encoding, check_encoding, encode_response
from pipeline.reward.settings import SETTINGS, RewardSettings

logger = logging.getLogger(__name__)

RESPONSES_PER_UPDATE = 512  # of the progress bar


class RewardModel:
    """Scores responses; higher is better. Use `load` to create one.

    >>> from pipeline import RewardModel
    >>> rm = RewardModel.load("runs/demo/reward")
    >>> responses = ["An apple.", "No.", "A carrot."]
    >>> scores = rm.score(["Name a fruit."] * 3, responses)
    >>> rm.rank("Name a fruit.", responses) == sorted(range(3), key=lambda i: -scores[i])
    True
    >>> rm.best_of_n("Name a fruit.", responses)[1] == max(scores)
    True
    """

    overlong = 0  # inputs that were cut so far

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, settings: RewardSettings
    ):
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings
        max_length = settings.encoding.max_length
        self._padding = probes.supports_padding(model, max_length)
        self._supports_prefix_sharing = self._padding and probes.supports_prefix_sharing(
            model, tokenizer.pad_token_id, max_length
        )
        names_types = "token_type_ids" in tokenizer.model_input_names
        self._use_token_types = names_types and probes.accepts_token_types(model)

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
        """Load a reward artifact, or an external sequence classifier (one without `reward.json`).

        Options:

        - `positive_label` is the label whose logit is the reward. An external classifier with several labels
          needs it.
        - `encoding` overrides fields of `Encoding`. For an external classifier, the chosen encoding is
          logged.
        - `precision` is that of the weights: "fp32", "bf16" or "fp16".
        - `device` defaults to the GPU if there is one. A quantized model stays where it was loaded.
        - `model` is the classifier, if it is already in memory.
        - `options` go to `from_pretrained`, such as `revision` and `trust_remote_code`.

        Raises `UserError` if `source` is no such checkpoint, or if a label or an encoding field is unknown.
        """
        options = settle_trust(options)
        path = hub.fetch_file(str(source), SETTINGS, options.get("revision"))
        settings = RewardSettings.load(path.parent) if path else None
        tokenizer = load_tokenizer(
            str(source),
            generates=False,
            distinct_pad=False,
            settle=settings is None or settings.encoding.turn == "template",
            **options,
        )
        if model is None:
            model = _load(str(source), tokenizer, settings, precision, options)
            if settings is None or settings.quantization == "none":
                model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

        settings = settings or _external_settings(str(source), model, tokenizer, options)
        overridden = _override_settings(str(source), model, settings, positive_label, encoding)
        if overridden != settings:  # then the statistics are those of another reward
            overridden.reward_mean = overridden.reward_std = None
            overridden.length_mean = overridden.length_slope = None
        check_encoding(tokenizer, overridden.encoding, str(source), max_positions(model))
        return cls(model, tokenizer, overridden)

    def score(
        self,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        *,
        alpha: float | None = None,
        normalize: bool = False,
        batch_size: int = 64,
    ) -> list[float]:
        """Return `alpha` × raw reward of each (prompt, response), as many as there are prompts.

        `normalize` first centres and scales the raw reward on the reference sample. `alpha` defaults to the
        artifact's own. Neither the order nor `batch_size` changes a score. Raises `UserError` if the two are
        no lists of texts, if their numbers differ, or if there is no reference sample to normalize by.
        """
        raw = self.settings.reward(self.logits(prompts, responses, batch_size=batch_size)).tolist()
        if normalize:
            if self.settings.reward_mean is None or self.settings.reward_std is None:
                raise UserError(
                    "score: no reference sample is known for this model and encoding, "
                    "so the reward cannot be normalized; use normalize=False"
                )
            raw = [(value - self.settings.reward_mean) / self.settings.reward_std for value in raw]
        return [(self.settings.alpha if alpha is None else alpha) * value for value in raw]

    def score_response(self, prompt: Text, response: Text) -> float:
        """Return the score of one response. Raises `UserError` if one of the two is no text."""
        check_text("prompt", prompt)
        check_text("response", response)
        return self.score([prompt], [response])[0]

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Text], responses: Sequence[Text], *, batch_size: int = 64) -> Tensor:
        """Return the head's outputs (N, C) in fp32 on the CPU; C is 1 for a scalar model.

        Raises `UserError` if the two are no lists of texts, or their numbers differ.
        """
        _check_pairs(prompts, responses, batch_size)
        if not len(prompts):
            return torch.zeros(0, self.model.config.num_labels)
        return self._logits(prompts, responses, batch_size)

    def encode(self, prompt: Text, response: Text) -> Encoded:
        """Return the token ids of a prompt and a response, as the model reads them.

        Raises `UserError` if the chat template refuses the conversation.
        """
        return encode_response(self.tokenizer, self.settings.encoding, prompt, response)

    def check_prompts(self, prompts: Sequence[Text], name: str) -> None:
        """Raise `UserError` if the chat template refuses a prompt; `name` says whose prompts they are."""
        for number, prompt in enumerate(prompts):
            with explain_row(f"{name}: row {number}: {self.model.name_or_path}"):
                self.encode(prompt, "")

    def _logits(self, prompts: Sequence[Text], responses: Sequence[Text], batch_size: int) -> Tensor:
        encoded = list(map(self.encode, prompts, responses))
        self._count_overlong(encoded)
        # The responses to one prompt form a group, even if they are not adjacent.
        keys = [str(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=keys.__getitem__)
        groups = [[encoded[i] for i in group] for _, group in groupby(order, key=keys.__getitem__)]
        logits = batching.compute_logits(
            self.model,
            groups,
            self.tokenizer.pad_token_id,
            share_prefixes=self._supports_prefix_sharing,
            batch_size=batch_size,
            use_token_types=self._use_token_types,
            padding=self._padding,
        )
        return logits[torch.tensor(order).argsort().to(logits.device)].float().cpu()

    def _count_overlong(self, encoded: Sequence[Encoded]) -> None:
        """Log the first time that inputs were cut, since what was cut does not count in their scores."""
        count = sum(row.overlong for row in encoded)
        if count and not self.overlong:
            how = self.settings.encoding
            logger.warning(
                "%s: %d of %d inputs are over max_length=%d and were cut (truncation: %s)",
                self.model.name_or_path,
                count,
                len(encoded),
                how.max_length,
                how.truncation,
            )
        self.overlong += count

    def lengths(self, responses: Sequence[Text]) -> list[int]:
        """Return the length of each response in tokens."""
        check_texts("responses", responses)
        return [len(text_ids(self.tokenizer, response_text(text))) for text in responses]

    def probabilities(self, prompts: Sequence[Text], responses: Sequence[Text]) -> list[dict[str, float]]:
        """Return {class: probability} for each response: the softmax, or of a multi-label model the sigmoids.

        Raises `UserError` if the model has one output.
        """
        if self.model.config.num_labels == 1:
            raise UserError("probabilities: this reward model has one scalar output, no classes; use score")
        rows = self.settings.probabilities(self.logits(prompts, responses)).tolist()
        return [dict(zip(_labels(self.model), row, strict=True)) for row in rows]

    def rank(self, prompt: Text, responses: Sequence[Text]) -> list[int]:
        """Return the indices of `responses`, best first; ties keep their order.

        Raises `UserError` if there are none.
        """
        scores = self._scores(prompt, responses)
        return sorted(range(len(scores)), key=lambda i: -scores[i])

    def best_of_n(self, prompt: Text, responses: Sequence[Text]) -> tuple[int, float]:
        """Return (index, score) of the best response. Raises `UserError` if there are none."""
        scores = self._scores(prompt, responses)
        best = max(range(len(scores)), key=scores.__getitem__)
        return best, scores[best]

    def _scores(self, prompt: Text, responses: Sequence[Text]) -> list[float]:
        check_text("prompt", prompt)
        check_texts("responses", responses)
        if not len(responses):
            raise UserError("responses: is an empty list; expected at least one response")
        return self.score([prompt] * len(responses), responses)


class DistributedRewardModel(RewardModel):
    """A reward model that every process has loaded; each process scores its share of the rows.

    All processes must call its methods, with the same arguments.
    """

    def logits(self, prompts: Sequence[Text], responses: Sequence[Text], *, batch_size: int = 64) -> Tensor:
        """Return the head's outputs (N, C) of all rows on every process; see `RewardModel.logits`.

        Raises `UserError` if one is not finite: no metric would be.
        """
        _check_pairs(prompts, responses, batch_size)
        local_logits = super().logits

        def compute(rows: Sequence[int]) -> list[list[float]]:
            logits: list[list[float]] = []
            with progress_bar("scoring", "responses", total=len(rows)) as bar:
                for start in range(0, len(rows), RESPONSES_PER_UPDATE):
                    chunk = rows[start : start + RESPONSES_PER_UPDATE]
                    texts = ([column[row] for row in chunk] for column in (prompts, responses))
                    logits += local_logits(*texts, batch_size=batch_size).tolist()
                    bar.update(len(logits) - start)
            return logits

        rows = map_across_processes(compute, range(len(prompts)))
        logits = torch.tensor(rows).reshape(len(prompts), self.model.config.num_labels)
        if not logits.isfinite().all():
            raise UserError(
                f"{self.model.name_or_path}: the reward of a response is not finite (NaN or infinite): its "
                "weights are broken; train it again with a lower training.learning_rate, and add --force"
            )
        return logits


def _check_pairs(prompts: Any, responses: Any, batch_size: Any) -> None:
    check_texts("prompts", prompts)
    check_texts("responses", responses)
    check_count("batch_size", batch_size)
    if len(prompts) != len(responses):
        raise UserError(
            f"score: {len(prompts)} prompts but {len(responses)} responses; expected equal numbers"
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

    # Trained on a quantized base: the artifact is the adapter with the head.
    adapter = read_adapter(source, revision, TaskType.SEQ_CLS, "reward")
    options = options | {"revision": adapter.revision, "head": (settings or RewardSettings()).head}
    base: Any = load_classifier(str(adapter.base_model_name_or_path), tokenizer, **weights, **options)
    with explain_load_errors(source, "LoRA adapter of a sequence classifier"):
        return PeftModel.from_pretrained(base, source, revision=revision)


def _external_settings(
    source: str, model: Any, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> RewardSettings:
    """Choose the settings of a classifier without `reward.json`.

    With several labels, `logit` is -1: none is the reward yet.
    """
    is_decoder = batching.score_head(model) is not None
    if not is_decoder and tokenizer.is_fast:
        form = "pair"
    elif is_decoder and not is_plain(tokenizer):
        form = "chat"
    else:
        form = "concatenation"
    encoding = Encoding(
        form=form,
        eos=False,  # the template writes what ends a response
        max_length=_external_max_length(model, tokenizer, is_decoder),
        date=fixed_date(tokenizer) if form == "chat" else None,
        trim_pad=form == "chat" and _reads_no_pad(source, options),
    )
    logger.warning(
        "%s: no reward.json; using %s; to change it: RewardModel.load(…, encoding={…})", source, encoding
    )
    return RewardSettings(
        objective="classification" if model.config.num_labels > 1 else "regression",
        outputs=_labels(model),
        multi_label=model.config.problem_type == "multi_label_classification",
        encoding=encoding,
        logit=0 if model.config.num_labels == 1 else -1,
    )


def _reads_no_pad(source: str, options: dict[str, Any]) -> bool:
    """Return whether the published classifier names a pad token, before which it then takes the score."""
    return AutoConfig.from_pretrained(source, **options).pad_token_id is not None


def _external_max_length(model: Any, tokenizer: PreTrainedTokenizerBase, is_decoder: bool) -> int:
    """Return the most tokens that a classifier reads; an encoder of unknown length reads 512."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) if is_decoder else None
    if context is not None and context == mixing_limit(model):  # its scale grows with the row
        context = max(context, 512)
    return min(tokenizer.model_max_length, max_positions(model) or context or 512)


def _override_settings(
    source: str,
    model: Any,
    settings: RewardSettings,
    positive_label: str | None,
    encoding: dict[str, Any] | None,
) -> RewardSettings:
    """Return a copy of the settings with the user's label and encoding."""
    try:
        overridden = dataclasses.replace(
            settings, encoding=dataclasses.replace(settings.encoding, **encoding or {})
        )
    except TypeError:
        known = ", ".join(field.name for field in dataclasses.fields(Encoding))
        raise UserError(f"encoding={encoding}: expected a dict with keys of {known}") from None
    if positive_label is not None:
        overridden.logit = _label_index(source, model, positive_label)
    elif settings.logit < 0:
        raise UserError(
            f"{source}: has the labels {_labels(model)} and no reward.json; "
            "name the label whose logit is the reward: positive_label=…"
        )
    return overridden


def _labels(model: Any) -> list[str]:
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def _label_index(source: str, model: Any, name: str) -> int:
    if name not in _labels(model):
        raise UserError(
            f"{source}: positive_label={name!r} is none of its labels: {', '.join(_labels(model))}"
        )
    return _labels(model).index(name)
