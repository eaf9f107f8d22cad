"""Training objectives of reward models: pure functions of scores that return a 0-d mean over rows.

Comparative objectives determine rewards only up to a constant per prompt. Adding one to all of a prompt's
scores changes no loss here except `centring`, which chooses that constant.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    preference: Tensor | None = None,
) -> Tensor:
    """Compute the mean of −log σ(chosen − rejected − margin), all (N,).

    Bradley and Terry 1952; margins as Touvron et al. 2023 (Llama 2, eq. 2). `preference` p (N,) is the
    probability that `chosen` wins, such as its share of the votes; 1 by default. The loss is the
    cross-entropy: p times this one plus 1 − p times that of the flipped pair. `label_smoothing` ε is the
    probability that a vote is wrong: p becomes (1 − ε) p + ε (1 − p).
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    share: Tensor | float = 1.0 if preference is None else preference
    share = (1 - label_smoothing) * share + label_smoothing * (1 - share)
    return -(share * F.logsigmoid(difference) + (1 - share) * F.logsigmoid(-difference)).mean()


def ranking(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Compute −log σ(better − worse), averaged over a prompt's strictly ordered pairs, then over prompts.

    Ouyang et al. 2022 (InstructGPT, eq. 1). `scores` (N, K); `ranks` (N, K), 1 is best; `mask` (N, K), False
    in the padding of a prompt with fewer responses. Ties make no pair, and a prompt without pairs is not
    counted.
    """
    ordered = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    losses = torch.where(ordered, -F.logsigmoid(scores[:, :, None] - scores[:, None, :]), 0.0).sum((1, 2))
    pairs = ordered.sum((1, 2))
    return losses[pairs > 0].div(pairs[pairs > 0]).sum() / max(int((pairs > 0).sum()), 1)


def plackett_luce(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Compute −log of the probability that responses are chosen in order of rank; Plackett 1975.

    Each response is chosen by the softmax of its score among the remaining ones. Shapes as in `ranking`. Each
    of several tied responses is chosen among all of them and all worse ones (Breslow's approximation). The
    last choice is certain and adds nothing.
    """
    left = (ranks[:, None, :] >= ranks[:, :, None]) & mask[:, None, :]  # (N, chosen, left to choose from)
    total = scores[:, None, :].expand(left.shape).masked_fill(~left, float("-inf"))
    losses = torch.where(mask, total.masked_fill(~mask[:, :, None], 0.0).logsumexp(2) - scores, 0.0)
    return losses.sum(1).mean()


def classification(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    shares: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of softmax(logits (N, C)) with labels (N,).

    `class_weights` (C,) weights each row by its class. `shares` (N, C), such as those of votes, replace the
    labels: a row counts for each class by its share. Rows of one class have the same loss either way.
    """
    if shares is None:
        return F.cross_entropy(logits, labels, class_weights, label_smoothing=label_smoothing)
    # torch divides by the weights of the rows only if targets are labels
    total = F.cross_entropy(logits, shares, class_weights, reduction="sum", label_smoothing=label_smoothing)
    return total / (len(shares) if class_weights is None else (shares * class_weights).sum())


def regression(scores: Tensor, ratings: Tensor) -> Tensor:
    """Compute the mean squared error of scores and ratings, both (N,)."""
    return F.mse_loss(scores, ratings)


def stepwise(logits: Tensor, labels: Tensor, steps: Tensor | float | None = None) -> Tensor:
    """Compute the cross-entropy of softmax(logits (S, 2)) with labels (S,), 1 for right and 0 for wrong.

    Lightman et al. 2023 ("Let's Verify Step by Step"). It is the mean over the S steps, whatever their length
    and whichever responses they are of. With `steps`, it is their sum divided by that number: of all steps
    of a batch that is computed in parts.
    """
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total / (max(len(labels), 1) if steps is None else steps)


def centring(scores: Tensor, mask: Tensor) -> Tensor:
    """Compute (score + score)² of two responses, averaged over a prompt's pairs, then over prompts.

    Eisenstein et al. 2023, eq. 4. `scores` and `mask` are (N, K). Added to a comparative objective with a
    small coefficient, it keeps rewards around zero.
    """
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(1)
    sums = torch.where(pairs, (scores[:, :, None] + scores[:, None, :]).square(), 0.0).sum((1, 2))
    return (sums / pairs.sum((1, 2)).clamp(min=1)).mean()
