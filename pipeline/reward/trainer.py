"""`trl.RewardTrainer` for every objective, encoder and decoder: its optimizer, LoRA and checkpoints, this project's batches and losses.

`trl.RewardTrainer` takes one output and pairs; what it does with the model and the data before training is met here, in one place, and
tests/reward/test_trainer.py fails where TRL changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from pipeline.config import OBJECTIVES
from pipeline.reward import batching, metrics, objectives
from pipeline.reward.encoding import Encoded
from pipeline.reward.objectives import bradley_terry, centring, classification, regression

ABSENT = -100  # a rank that pads a prompt with fewer answers


@dataclass
class Batch:
    """The answers of each row, their margins (N,), and which outputs of an ensemble learn from it (N, outputs): of no type that the Trainer
    would walk into in search of tensors."""

    groups: list[list[Encoded]]
    margins: Tensor | None
    members: Tensor


class RewardTrainer(trl.RewardTrainer):
    """`objective` is a key of `OBJECTIVES`; data is what `examples` makes. Evaluation is over rows, whatever the batch."""

    args: trl.RewardConfig
    objective: str
    train_dataset: Dataset
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: Any,
        objective: str,
        *,
        class_weights: Sequence[float] | None = None,
        positive: int = 0,
        **options: Any,
    ):
        self.objective = objective
        self.positive = positive
        self.class_weights = torch.tensor(class_weights) if class_weights else None
        labels = model.config.id2label
        self.classes = list(labels.values())
        model.config.num_labels = 1  # TRL refuses a model of several outputs, and does nothing else about it
        super().__init__(model=model, data_collator=self._collate, compute_metrics=self._measure, **options)
        trained: Any = self.model
        trained.config.id2label, trained.config.label2id = (
            labels,
            {name: index for index, name in labels.items()},
        )
        for parameter in trained.parameters():
            if parameter.requires_grad:  # TRL halves the adapter and the head of a quantized base, which then do not fit fp32 activations
                parameter.data = parameter.data.float()
        self.label_names = ["labels"]
        self._tokens = 0  # read in training, on all ranks as many as on this one
        self.pad = self.processing_class.pad_token_id
        self.types = "token_type_ids" in self.processing_class.model_input_names
        longest = max(len(ids) for row in self.train_dataset["ids"] for ids in row)
        with self.accelerator.autocast():
            self.shared = OBJECTIVES[objective].compares and batching.supports_prefix_sharing(
                trained, self.pad, longest
            )

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """TRL's own would tokenise."""
        return dataset

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        groups = [
            [Encoded(ids, answer, False) for ids, answer in zip(row["ids"], row["answer"], strict=True)]
            for row in rows
        ]
        margins = torch.tensor([row["margin"] for row in rows]) if "margin" in rows[0] else None
        members = (
            torch.tensor([row["members"] for row in rows])
            if "members" in rows[0]
            else torch.ones(len(rows), len(self.classes))
        )
        targets = [row["target"] for row in rows]
        if OBJECTIVES[self.objective].compares:
            most = max(map(len, targets))
            targets = [[*ranks, *[ABSENT] * (most - len(ranks))] for ranks in targets]
        return {"batch": Batch(groups, margins, members.bool()), "labels": torch.tensor(targets)}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch, targets = inputs["batch"], inputs["labels"]
        self._tokens += (
            sum(len(answer.ids) for group in batch.groups for answer in group)
            * self.args.world_size
            * model.training
        )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        logits = batching.compute_logits(
            model, batch.groups, self.pad, shared=self.shared, types=self.types, at_once=sharded
        ).float()
        if self.objective == "classification":
            weights = None if self.class_weights is None else self.class_weights.to(logits.device)
            loss = classification(logits, targets, weights, self.args.label_smoothing_factor)
            return (loss, {"logits": logits}) if return_outputs else loss
        # (N, K) for each output of an ensemble, or (N,) where answers are judged alone
        members = [self._grid(scores, targets) for scores in logits.unbind(1)]
        rows = batch.members.to(targets.device).unbind(1)
        loss = torch.stack(
            [self._loss(scores, targets, batch, mine) for scores, mine in zip(members, rows, strict=True)]
        ).mean()
        return (loss, {"logits": torch.stack(members).mean(0)}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | {"num_tokens": float(self._tokens)} if "loss" in logs else logs, start_time)

    def _grid(self, scores: Tensor, targets: Tensor) -> Tensor:
        return (
            torch.zeros(targets.shape, device=scores.device).masked_scatter(targets > 0, scores)
            if targets.ndim == 2
            else scores
        )

    def _loss(self, scores: Tensor, targets: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """The objective on the rows that one member of an ensemble learns from."""
        if not rows.any():
            return scores.sum() * 0
        scores, targets = scores[rows], targets[rows]
        if self.objective == "regression":
            return regression(scores, targets)
        mask = targets > 0
        if self.objective == "pairwise":
            margin = None if batch.margins is None else batch.margins.to(rows.device)[rows]
            loss = bradley_terry(scores[:, 0], scores[:, 1], margin, self.args.label_smoothing_factor)
        else:
            loss = getattr(objectives, self.objective)(scores, targets, mask)
        coefficient = self.args.center_rewards_coefficient
        return loss + coefficient * centring(scores, mask) if coefficient else loss

    def _measure(self, found: EvalPrediction) -> dict[str, float]:
        """Figures over all rows of an evaluation."""
        scores, targets = np.asarray(found.predictions), np.asarray(found.label_ids)
        if self.objective == "classification":
            figures = metrics.label_metrics(scores, targets, self.classes, self.positive)
        elif self.objective == "regression":
            figures = metrics.rating_metrics(scores, targets)
        else:
            kept = targets > 0
            figures = metrics.ranking_metrics(
                *([row[mask] for row, mask in zip(each, kept, strict=True)] for each in (scores, targets))
            )
        return {name: value for name, value in figures.items() if isinstance(value, float)}
