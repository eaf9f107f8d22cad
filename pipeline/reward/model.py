"""`RewardModel`: loads a reward artifact and scores responses.

Its scores are what plain `transformers` computes, times `alpha`. The artifact is a sequence-classification
checkpoint (token-classification for a stepwise model) plus `reward.json`, which contains `RewardSettings`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.schema import Text
from pipeline.data.texts import check_count, check_steps, check_text, check_texts
from pipeline.distributed.processes import map_across_processes
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError, explain_row
from pipeline.models.chat import response_text, text_ids
from pipeline.models.loading import settle_trust
from pipeline.models.positions import max_positions
from pipeline.reward import batching, probes
from pipeline.reward.arguments import check_load, check_parts, check_scale, check_step_scores, move_model
from pipeline.reward.encoding import CUT, Encoded, check_encoding, encode_response
from pipeline.reward.loading import (
    external_settings,
    label_names,
    load_model,
    load_reward_tokenizer,
    override_settings,
)
from pipeline.reward.settings import RewardSettings
from pipeline.reward.steps import read_steps
from pipeline.reward.token_rewards import StepRewards

logger = logging.getLogger(__name__)

Response = Text | Sequence[str]  # a list of strings is the steps of a response

UNREAD = 0.5  # the score of a step whose end was cut: nothing is known of it
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
    warned_of_single_steps = False  # that no response of a call has the separator of steps

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, settings: RewardSettings
    ):
        check_parts(model, tokenizer, settings)
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
        tokenizer: PreTrainedTokenizerBase | None = None,
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
        - `model` and `tokenizer` are the classifier and its tokenizer, if they are already in memory. If both
          are, `source` may be empty.
        - `options` go to `from_pretrained`, such as `revision` and `trust_remote_code`.

        Raises `UserError` if `source` is no such checkpoint, or if a label or an encoding field is unknown.
        """
        check_load(source, precision, model, tokenizer, options)
        options = settle_trust(options)
        settings = RewardSettings.find(str(source), options.get("revision")) if source else None
        tokenizer = tokenizer or load_reward_tokenizer(str(source), settings, **options)
        if model is None:
            model = load_model(str(source), tokenizer, settings, precision, options)
            if settings is None or settings.quantization == "none":
                model = move_model(model, device)

        settings = settings or external_settings(str(source), model, tokenizer, options)
        overridden = override_settings(str(source), model, settings, positive_label, encoding)
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
        if self.settings.is_stepwise:
            steps = self.score_steps(prompts, responses, batch_size=batch_size)
            return self.aggregate(steps, alpha=alpha, normalize=normalize)
        raw = self.settings.reward(self.logits(prompts, responses, batch_size=batch_size)).tolist()
        return self._scaled(raw, alpha, normalize)

    def aggregate(
        self, steps: Sequence[Sequence[float]], *, alpha: float | None = None, normalize: bool = False
    ) -> list[float]:
        """Return what `score` returns for responses with these scores of their steps."""
        check_step_scores(steps)
        return self._scaled([self.settings.aggregated(row) for row in steps], alpha, normalize)

    def _scaled(self, raw: list[float], alpha: float | None, normalize: bool) -> list[float]:
        check_scale(alpha, normalize)
        if normalize:
            if self.settings.reward_mean is None or self.settings.reward_std is None:
                raise UserError(
                    "score: no reference sample is known for this model and encoding, "
                    "so the reward cannot be normalized; use normalize=False"
                )
            raw = [(value - self.settings.reward_mean) / self.settings.reward_std for value in raw]
        return [(self.settings.alpha if alpha is None else alpha) * value for value in raw]

    def score_steps(
        self, prompts: Sequence[Text], responses: Sequence[Response], *, batch_size: int = 64
    ) -> list[list[float]]:
        """Return for each response the probability of each step that it is right; for a stepwise model.

        A response is a text, which `encoding.step_separator` splits, or the list of its steps. A step whose
        end was cut at `max_length` has the score 0.5, since the model did not read it. Raises `UserError` if
        the model is not stepwise, the two are no lists of texts, or their numbers differ.
        """
        return [list(steps.rewards) for steps in self.judge_steps(prompts, responses, batch_size=batch_size)]

    def judge_steps(
        self, prompts: Sequence[Text], responses: Sequence[Response], *, batch_size: int = 64
    ) -> list[StepRewards]:
        """Return the scores of `score_steps`, and the offset in its response at which each step ends."""
        if not self.settings.is_stepwise:
            raise UserError(
                f"score_steps: {self.model.name_or_path} has the objective {self.settings.objective}, which "
                "scores whole responses; use score, or a model of the objective stepwise"
            )
        check_texts("prompts", prompts)
        check_steps("responses", responses)
        check_count("batch_size", batch_size)
        _check_counts(prompts, responses)
        separator = self.settings.encoding.step_separator
        read = [read_steps(response, separator) for response in responses]
        if len(read) > 1 and all(len(ends) == 1 for _, ends in read):
            self._warn_of_single_steps(len(read))
        scores = self._step_scores(prompts, read, batch_size) if read else []
        return [StepRewards(row, ends) for row, (_, ends) in zip(scores, read, strict=True)]

    def score_response(self, prompt: Text, response: Text) -> float:
        """Return the score of one response. Raises `UserError` if one of the two is no text."""
        check_text("prompt", prompt)
        check_text("response", response)
        return self.score([prompt], [response])[0]

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Text], responses: Sequence[Text], *, batch_size: int = 64) -> Tensor:
        """Return the head's outputs (N, C) in fp32 on the CPU; C is 1 for a scalar model.

        Raises `UserError` if the two are no lists of texts, their numbers differ, or the model is stepwise.
        """
        _check_pairs(prompts, responses, batch_size)
        if self.settings.is_stepwise:
            raise UserError(
                "logits: a stepwise model has outputs for each step of a response; use score_steps"
            )
        if not len(prompts):
            return torch.zeros(0, self.model.config.num_labels)
        return self._logits(prompts, responses, batch_size)

    def encode(self, prompt: Text, response: Text) -> Encoded:
        """Return the token ids of a prompt and a response, as the model reads them.

        Raises `UserError` if one of the two is no text, or the chat template refuses the conversation.
        """
        check_text("prompt", prompt)
        check_text("response", response)
        return encode_response(self.tokenizer, self.settings.encoding, prompt, response)

    def check_prompts(self, prompts: Sequence[Text], name: str) -> None:
        """Raise `UserError` if the chat template refuses a prompt; `name` says whose prompts they are."""
        for number, prompt in enumerate(prompts):
            with explain_row(f"{name}: row {number}: {self.model.name_or_path}"):
                self.encode(prompt, "")

    def _logits(self, prompts: Sequence[Text], responses: Sequence[Text], batch_size: int) -> Tensor:
        encoded = list(map(self.encode, prompts, responses))
        self._count_overlong(encoded)
        return self._compute(prompts, responses, encoded, batch_size)

    @torch.inference_mode()
    def _step_scores(
        self, prompts: Sequence[Text], responses: Sequence[tuple[Text, list[int]]], batch_size: int
    ) -> list[list[float]]:
        """Return the score of each step; a response is what `read_steps` returns."""
        encoded = [
            encode_response(self.tokenizer, self.settings.encoding, prompt, text, ends)
            for prompt, (text, ends) in zip(prompts, responses, strict=True)
        ]
        self._count_overlong(encoded)
        logits = self._compute(prompts, [text for text, _ in responses], encoded, batch_size)
        scores = iter(self.settings.reward(logits).tolist())
        return [[UNREAD if step == CUT else next(scores) for step in row.steps or ()] for row in encoded]

    def _compute(
        self, prompts: Sequence[Text], responses: Sequence[Text], encoded: Sequence[Encoded], batch_size: int
    ) -> Tensor:
        """Return the logits (outputs, C) of the encoded responses, in fp32 on the CPU."""
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
        outputs = batching.expand_order(order, [len(row.positions) for row in encoded])
        return logits[torch.tensor(outputs, dtype=torch.long).argsort().to(logits.device)].float().cpu()

    def _warn_of_single_steps(self, count: int) -> None:
        """Log once that no response of a call has the separator, so that each is one step."""
        if not self.warned_of_single_steps:
            self.warned_of_single_steps = True
            logger.warning(
                "%s: none of %d responses contains the separator of steps %r, so each is one step",
                self.model.name_or_path,
                count,
                self.settings.encoding.step_separator,
            )

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
        return [dict(zip(label_names(self.model), row, strict=True)) for row in rows]

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
        rows = self._spread(super().logits, prompts, responses, batch_size)
        return torch.tensor(rows).reshape(len(prompts), self.model.config.num_labels)

    def _step_scores(
        self, prompts: Sequence[Text], responses: Sequence[tuple[Text, list[int]]], batch_size: int
    ) -> list[list[float]]:
        return self._spread(super()._step_scores, prompts, responses, batch_size)

    def _spread(
        self, score: Callable[..., Any], prompts: Sequence[Any], responses: Sequence[Any], batch_size: int
    ) -> list[list[float]]:
        """Return one list of numbers for each row, of which this process computes its share."""

        def compute(rows: Sequence[int]) -> list[list[float]]:
            scores: list[list[float]] = []
            with progress_bar("scoring", "responses", total=len(rows)) as bar:
                for start in range(0, len(rows), RESPONSES_PER_UPDATE):
                    chunk = rows[start : start + RESPONSES_PER_UPDATE]
                    texts = ([column[row] for row in chunk] for column in (prompts, responses))
                    scores += _as_lists(score(*texts, batch_size=batch_size))
                    bar.update(len(scores) - start)
            return scores

        rows = map_across_processes(compute, range(len(prompts)))
        if not all(math.isfinite(value) for row in rows for value in row):
            raise UserError(
                f"{self.model.name_or_path}: the reward of a response is not finite (NaN or infinite): its "
                "weights are broken; train it again with a lower training.learning_rate, and add --force"
            )
        return rows


def _as_lists(scores: Any) -> list[list[float]]:
    rows: list[list[float]] = scores.tolist() if isinstance(scores, Tensor) else scores
    return rows


def _check_pairs(prompts: Any, responses: Any, batch_size: Any) -> None:
    check_texts("prompts", prompts)
    check_texts("responses", responses)
    check_count("batch_size", batch_size)
    _check_counts(prompts, responses)


def _check_counts(prompts: Any, responses: Any) -> None:
    if len(prompts) != len(responses):
        raise UserError(
            f"score: {len(prompts)} prompts but {len(responses)} responses; expected equal numbers"
        )
