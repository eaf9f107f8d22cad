"""What a reward model is trained to do: pure functions over its scores. Each returns a 0-d mean over rows.

Comparative objectives fix rewards only up to a constant per prompt: adding one to all of a prompt's scores changes no loss here but
`centring`, which is there to choose that constant.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """−log σ(chosen − rejected − margin), all (N,); Bradley and Terry 1952, margins as Touvron et al. 2023 (Llama 2, eq. 2).

    `label_smoothing` ε is the chance that a label is the wrong way round: (1 − ε) of this loss and ε of that of the flipped pair.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -(
        (1 - label_smoothing) * F.logsigmoid(difference) + label_smoothing * F.logsigmoid(-difference)
    ).mean()


def ranking(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """−log σ(better − worse), the mean over a prompt's strictly ordered pairs, then over prompts; Ouyang et al. 2022 (InstructGPT, eq. 1).

    scores (N, K); ranks (N, K), 1 is best; mask (N, K), False where a prompt has fewer answers. Ties make no pair.
    """
    ordered = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    losses = torch.where(ordered, -F.logsigmoid(scores[:, :, None] - scores[:, None, :]), 0.0).sum((1, 2))
    pairs = ordered.sum((1, 2))
    return losses[pairs > 0].div(pairs[pairs > 0]).sum() / max(int((pairs > 0).sum()), 1)


def plackett_luce(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """−log of the chance that answers are picked in order of rank, each with softmax of its score among those left; Plackett 1975.

    Shapes as `ranking`. Tied answers are each picked among themselves and all that is worse, as if picked first of the tied
    (Breslow's approximation). The last pick is certain and counts nothing.
    """
    left = (ranks[:, None, :] >= ranks[:, :, None]) & mask[:, None, :]  # (N, picked, left to pick from)
    total = scores[:, None, :].expand(left.shape).masked_fill(~left, float("-inf"))
    losses = torch.where(mask, total.masked_fill(~mask[:, :, None], 0.0).logsumexp(2) - scores, 0.0)
    return losses.sum(1).mean()


def classification(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of softmax(logits (N, C)) with labels (N,); weighted by the weight of each row's class, (C,)."""
    return F.cross_entropy(logits, labels, class_weights, label_smoothing=label_smoothing)


def regression(scores: Tensor, ratings: Tensor) -> Tensor:
    """Mean squared error, both (N,)."""
    return F.mse_loss(scores, ratings)


def centring(scores: Tensor, mask: Tensor) -> Tensor:
    """(score + score)² of two answers to one prompt, the mean over its pairs, then over prompts; Eisenstein et al. 2023, eq. 4.

    scores and mask (N, K). Added to a comparative objective with a small coefficient, it keeps rewards around zero.
    """
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(1)
    sums = torch.where(pairs, (scores[:, :, None] + scores[:, None, :]).square(), 0.0).sum((1, 2))
    return (sums / pairs.sum((1, 2)).clamp(min=1)).mean()
