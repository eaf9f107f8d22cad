"""Losses by hand: σ(0) = ½, σ(log 3) = ¾."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reward.objectives import (
    bradley_terry,
    centring,
    classification,
    plackett_luce,
    ranking,
    regression,
    stepwise,
)

LOG3 = math.log(3)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "smoothing", "expected"),
    [
        ([1.0], [1.0], None, 0.0, math.log(2)),
        ([LOG3, 0.0], [0.0, 0.0], None, 0.0, (math.log(4 / 3) + math.log(2)) / 2),
        ([LOG3], [0.0], [LOG3], 0.0, math.log(2)),
        ([LOG3], [0.0], None, 0.25, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        (
            [0.0],
            [LOG3],
            [LOG3],
            1.0,
            -math.log(9 / 10),
        ),  # all labels the wrong way round: the loss of the flipped pair
    ],
)
def test_bradley_terry(chosen, rejected, margin, smoothing, expected):
    found = bradley_terry(
        tensor(chosen), tensor(rejected), None if margin is None else tensor(margin), smoothing
    )
    assert found.ndim == 0
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("preference", "smoothing", "expected"),
    [
        ([1.0], 0.0, math.log(4 / 3)),
        ([0.75], 0.0, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),  # three votes of four
        ([0.5], 0.0, (math.log(4 / 3) + math.log(4)) / 2),
        ([0.5], 0.3, (math.log(4 / 3) + math.log(4)) / 2),  # wrong votes leave a tie as it is
        ([0.75], 0.2, 0.65 * math.log(4 / 3) + 0.35 * math.log(4)),  # 0.8 · 0.75 + 0.2 · 0.25
    ],
)
def test_bradley_terry_of_votes_is_the_cross_entropy_with_their_share(preference, smoothing, expected):
    loss = bradley_terry(tensor([LOG3]), tensor([0.0]), None, smoothing, tensor(preference))
    assert loss.item() == pytest.approx(expected)


def test_votes_of_a_pair_have_the_mean_loss_of_their_rows():
    scores = tensor([0.3, 0.3, -0.7]), tensor([-0.7, -0.7, 0.3])  # two for one side, one for the other
    merged = bradley_terry(tensor([0.3]), tensor([-0.7]), preference=tensor([2 / 3]))
    assert merged.item() == pytest.approx(bradley_terry(*scores).item())


# Of two prompts: three answers whose ordered pairs have margins log 3, 2 log 3, log 3; two answers, a
# margin of −log 3, and nothing third.
SCORES = [[2 * LOG3, LOG3, 0.0], [0.0, LOG3, 99.0]]
RANKS = [[1, 2, 3], [1, 2, 0]]
MASK = [[True, True, True], [True, True, False]]


def grid(scores=SCORES, ranks=RANKS, mask=MASK):
    return tensor(scores), torch.tensor(ranks), torch.tensor(mask)


def test_ranking_is_the_mean_over_a_prompts_pairs_then_over_prompts():
    first = (2 * math.log(4 / 3) + math.log(10 / 9)) / 3
    assert ranking(*grid()).item() == pytest.approx((first + math.log(4)) / 2)


def test_ties_make_no_pair_and_a_prompt_without_pairs_counts_nothing():
    tied = grid([[LOG3, 0.0, 5.0], [1.0, 2.0, 3.0]], [[1, 2, 2], [1, 1, 1]], [[True] * 3] * 2)
    assert ranking(*tied).item() == pytest.approx(
        (math.log(4 / 3) - math.log(1 / (1 + math.exp(5 - LOG3)))) / 2
    )
    nothing = tensor([[1.0, 2.0]]).requires_grad_()
    loss = ranking(nothing, torch.tensor([[1, 1]]), torch.tensor([[True, True]]))
    loss.backward()
    assert loss.item() == 0
    assert nothing.grad.tolist() == [[0.0, 0.0]]


def test_ranking_of_two_answers_is_bradley_terry():
    scores = tensor([[0.3, -1.2], [2.0, 2.5]])
    expected = bradley_terry(scores[:, 0], scores[:, 1])
    assert ranking(
        scores, torch.tensor([[1, 2]] * 2), torch.ones(2, 2, dtype=torch.bool)
    ).item() == pytest.approx(expected.item())


def test_plackett_luce_is_the_chance_of_picking_in_order():
    # Odds 9 : 3 : 1, so 9/13 · 3/4 · 1; then odds 1 : 3.
    assert plackett_luce(*grid()).item() == pytest.approx((-math.log(9 / 13 * 3 / 4) - math.log(1 / 4)) / 2)


def test_plackett_luce_ties_are_each_picked_from_all_that_is_left():
    # Odds 9 : 3 : 1 with the first two tied: 9/13 · 3/13 · 1.
    assert plackett_luce(*grid(SCORES[:1], [[1, 1, 2]], MASK[:1])).item() == pytest.approx(
        -math.log(9 / 13 * 3 / 13)
    )


def test_classification_and_regression():
    logits = tensor([[0.0, LOG3], [0.0, 0.0]])
    labels = torch.tensor([1, 0])
    assert classification(logits, labels).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    weighted = (3 * math.log(4 / 3) + 1 * math.log(2)) / 4
    assert classification(logits, labels, tensor([1.0, 3.0])).item() == pytest.approx(weighted)
    smoothed = (
        0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)
    ) / 2  # ε = 0.2 over two classes: 0.9 and 0.1
    assert classification(logits, labels, label_smoothing=0.2).item() == pytest.approx(smoothed)
    shares = tensor([[0.25, 0.75], [1.0, 0.0]])
    soft = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert classification(logits, labels, shares=shares).item() == pytest.approx((soft + math.log(2)) / 2)
    weighted = (3 * 0.75 * math.log(4 / 3) + 0.25 * math.log(4) + math.log(2)) / (3 * 0.75 + 0.25 + 1)
    weights = tensor([1.0, 3.0])
    assert classification(logits, labels, weights, shares=shares).item() == pytest.approx(weighted)
    one_hot = classification(logits, labels, weights, 0.2, tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert one_hot.item() == pytest.approx(classification(logits, labels, weights, 0.2).item())
    assert regression(tensor([1.0, -1.0]), tensor([0.0, 1.0])).item() == pytest.approx(2.5)


def test_centring_is_trls_for_pairs_and_the_mean_over_pairs_for_more():
    assert centring(
        tensor([[1.0, 2.0], [-1.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    ).item() == pytest.approx(4.5)
    assert centring(tensor([[1.0, 2.0, 4.0], [1.0, -2.0, 99.0]]), torch.tensor(MASK)).item() == pytest.approx(
        ((9 + 25 + 36) / 3 + 1) / 2
    )


comparative = {
    "bradley_terry": lambda scores, ranks, mask: bradley_terry(scores[:, 0], scores[:, 1]),
    "ranking": ranking,
    "plackett_luce": plackett_luce,
}
numbers = st.integers(-40, 40).map(lambda eighths: eighths / 8)  # exact sums: ties stay ties


@pytest.mark.parametrize("loss", comparative.values(), ids=comparative)
@given(rows=st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=4), constant=numbers)
def test_only_differences_count(loss, rows, constant):
    scores, ranks, mask = grid([*rows], [[2, 1, 3]] * len(rows), [[True] * 3] * len(rows))
    assert loss(scores + constant, ranks, mask).item() == pytest.approx(loss(scores, ranks, mask).item())
    assert (scores + constant).argsort(dim=1, stable=True).tolist() == scores.argsort(
        dim=1, stable=True
    ).tolist()


@pytest.mark.parametrize("loss", [ranking, plackett_luce])
@given(row=st.permutations([0, 1, 2, 3]), scores=st.tuples(numbers, numbers, numbers, numbers))
def test_the_order_in_which_answers_are_listed_does_not_count(loss, row, scores):
    listed = grid([list(scores)], [[1, 2, 2, 3]], [[True] * 4])
    shuffled = grid([[scores[i] for i in row]], [[[1, 2, 2, 3][i] for i in row]], [[True] * 4])
    assert loss(*shuffled).item() == pytest.approx(loss(*listed).item())


@pytest.mark.parametrize("loss", [ranking, plackett_luce, lambda scores, ranks, mask: centring(scores, mask)])
def test_what_lies_behind_the_mask_has_no_gradient(loss):
    scores, ranks, mask = grid()
    scores.requires_grad_()
    loss(scores, ranks, mask).backward()
    assert scores.grad[1, 2] == 0
    assert scores.grad[mask].abs().sum() > 0
    assert torch.isfinite(scores.grad).all()


def test_every_step_counts_once():
    logits, labels = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]]), torch.tensor([1, 0])
    # The probabilities of the labels are 1/2 and 1/4.
    assert stepwise(logits, labels).item() == pytest.approx(1.5 * math.log(2))
    assert stepwise(logits, labels, 4).item() == pytest.approx(0.75 * math.log(2))  # half of four steps
    assert stepwise(logits[:0], labels[:0]).item() == 0
