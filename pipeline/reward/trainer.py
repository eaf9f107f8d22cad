"""`trl.RewardTrainer` for every objective, encoder and decoder.

The optimizer, LoRA and checkpoints are TRL's; the batches and losses are this package's. `trl.RewardTrainer`
supports one output and pairs only. Everything it does to the model and the data before training is handled
here, in one place; tests/reward/test_trainer.py fails if TRL changes it.
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
from pipeline.data.schema import shares_of
from pipeline.errors import UserError
from pipeline.reward import batching, metrics, objectives, probes
from pipeline.reward.encoding import Encoded
from pipeline.reward.objectives import bradley_terry, centring, classification, regression, stepwise
from pipeline.reward.step_metrics import step_metrics

ABSENT = -100  # a rank that pads a prompt with fewer responses, or a label a response with fewer steps


@dataclass
class Batch:
    """The responses of each row, the outputs that learn from each row (N, outputs), and optional targets.

    These are margins (N,), preferences (N,), and the shares of the classes (N, C). The Trainer does not look
    inside this type for tensors to move or to gather.
    """

    groups: list[list[Encoded]]
    members: Tensor
    margins: Tensor | None = None
    preferences: Tensor | None = None
    shares: Tensor | None = None


class RewardTrainer(trl.RewardTrainer):
    """A trainer for one `objective`, a key of `OBJECTIVES`, on the rows of `tokenize_records`.

    `class_weights` and `positive`, the index of the class that is the reward, apply to classification. The
    metrics of an evaluation are over rows, whatever the batch.
    """

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

        model.config.num_labels = 1  # TRL refuses several outputs, and uses the number for nothing else
        super().__init__(model=model, data_collator=self._collate, compute_metrics=self._measure, **options)
        trained: Any = self.model
        trained.config.id2label = labels
        trained.config.label2id = {name: index for index, name in labels.items()}
        for parameter in trained.parameters():
            if parameter.requires_grad:
                # TRL casts the adapter and head of a quantized base to bf16, which does not fit fp32
                # activations.
                parameter.data = parameter.data.float()

        self.label_names = ["labels"]
        if objective == "stepwise":  # the loss is divided by the number of steps in all parts of a batch
            self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._tokens = 0  # seen in training, if every rank sees as many as this one
        self.pad_token_id = self.processing_class.pad_token_id
        names_types = "token_type_ids" in self.processing_class.model_input_names
        self.use_token_types = names_types and probes.accepts_token_types(trained)
        longest = max(len(ids) for row in self.train_dataset["ids"] for ids in row)
        self.padding = probes.supports_padding(trained, longest)
        self.single_batch = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.single_batch and not self.padding:
            raise UserError(
                "reward: padding changes the scores of this base, but a sharded launch pads; "
                "use another base, or a launch that does not shard"
            )
        with self.accelerator.autocast():
            compares = OBJECTIVES[objective].compares and self.padding
            self.share_prefixes = compares and probes.supports_prefix_sharing(
                trained, self.pad_token_id, longest
            )

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """Return the dataset as it is; TRL's method would tokenise it."""
        return dataset

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        groups = [
            [
                Encoded(ids, start, False, row.get("steps"))
                for ids, start in zip(row["ids"], row["response_start"], strict=True)
            ]
            for row in rows
        ]
        margins, preferences = (
            torch.tensor([row[name] for row in rows]) if name in rows[0] else None
            for name in ("margin", "preference")
        )
        shares = None
        if "shares" in rows[0]:
            labelled = ({"label": row["target"], "label_shares": row["shares"]} for row in rows)
            shares = torch.tensor([shares_of(record, len(self.classes)) for record in labelled])
        if "members" in rows[0]:
            members = torch.tensor([row["members"] for row in rows])
        else:
            members = torch.ones(len(rows), len(self.classes))

        targets = [row["target"] for row in rows]
        if isinstance(targets[0], list):
            most = max(map(len, targets))
            targets = [[*ranks, *[ABSENT] * (most - len(ranks))] for ranks in targets]
        batch = Batch(groups, members.bool(), margins, preferences, shares)
        return {"batch": batch, "labels": torch.tensor(targets)}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, and with `return_outputs` the logits.

        Logits are (N, C) for classification, (N, K) for objectives that compare, (N,) for others. For
        stepwise they are log-odds of right (N, steps). Its loss is the mean over all steps of a batch: those
        of all ranks and all parts of which gradients are accumulated.
        """
        batch, targets = inputs["batch"], inputs["labels"]
        tokens = sum(len(response.ids) for group in batch.groups for response in group)
        self._tokens += tokens * self.args.world_size * model.training

        logits = batching.compute_logits(
            model,
            batch.groups,
            self.pad_token_id,
            share_prefixes=self.share_prefixes,
            use_token_types=self.use_token_types,
            padding=self.padding,
            single_batch=self.single_batch,
        ).float()
        if self.objective == "classification":
            weights = None if self.class_weights is None else self.class_weights.to(logits.device)
            shares = None if batch.shares is None else batch.shares.to(logits.device)
            loss = classification(logits, targets, weights, self.args.label_smoothing_factor, shares)
            return (loss, {"logits": logits}) if return_outputs else loss

        if self.objective == "stepwise":
            labels = targets[targets != ABSENT].to(logits.device)
            # Gradients are averaged over ranks, and the number of steps is that of all ranks.
            steps = None if num_items_in_batch is None else num_items_in_batch / self.args.world_size
            loss = stepwise(logits, labels, steps)
            return (
                (loss, {"logits": self._to_grid(logits[:, 1] - logits[:, 0], targets)})
                if return_outputs
                else loss
            )

        # (N, K) for each output of an ensemble, or (N,) for an objective that scores each response alone
        scores = [self._to_grid(output, targets) for output in logits.unbind(1)]
        rows = batch.members.to(targets.device).unbind(1)
        losses = [self._loss(member, targets, batch, mask) for member, mask in zip(scores, rows, strict=True)]
        loss = torch.stack(losses).mean()
        return (loss, {"logits": torch.stack(scores).mean(0)}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the number of tokens seen in training."""
        super().log(logs | {"num_tokens": float(self._tokens)} if "loss" in logs else logs, start_time)

    def _to_grid(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the scores in the shape of the targets, 0 in the padding."""
        if targets.ndim != 2:
            return scores
        return torch.zeros(targets.shape, device=scores.device).masked_scatter(targets != ABSENT, scores)

    def _loss(self, scores: Tensor, targets: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """Return the objective on the rows (a mask) that one member of an ensemble learns from."""
        if not rows.any():
            return scores.sum() * 0
        scores, targets = scores[rows], targets[rows]
        if self.objective == "regression":
            return regression(scores, targets)
        mask = targets > 0
        if self.objective == "pairwise":
            margin, preference = (
                None if values is None else values.to(rows.device)[rows]
                for values in (batch.margins, batch.preferences)
            )
            smoothing = self.args.label_smoothing_factor
            loss = bradley_terry(scores[:, 0], scores[:, 1], margin, smoothing, preference)
        else:
            loss = getattr(objectives, self.objective)(scores, targets, mask)
        coefficient = self.args.center_rewards_coefficient
        return loss + coefficient * centring(scores, mask) if coefficient else loss

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics over all rows of an evaluation."""
        scores, targets = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if self.objective == "classification":
            computed = metrics.label_metrics(scores, targets, self.classes, self.positive, intervals=False)
        elif self.objective == "regression":
            computed = metrics.rating_metrics(scores, targets, intervals=False)
        elif self.objective == "stepwise":
            present = [row != ABSENT for row in targets]
            computed = step_metrics(
                [1 / (1 + np.exp(-row[mask])) for row, mask in zip(scores, present, strict=True)],
                [row[mask] for row, mask in zip(targets, present, strict=True)],
            )
        else:
            rows = [(row[ranks > 0], ranks[ranks > 0]) for row, ranks in zip(scores, targets, strict=True)]
            ordered = [
                (row, ranks) for row, ranks in rows if ranks.min() < ranks.max()
            ]  # ties have no winner
            computed = metrics.ranking_metrics(
                [row for row, _ in ordered], [ranks for _, ranks in ordered], intervals=False
            )
        return {name: value for name, value in computed.items() if isinstance(value, float)}
