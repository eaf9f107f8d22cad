"""PPO's mathematics against numbers worked by hand, and against plain loops in float64 written from the
papers.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ppo.functional import (
    entropy,
    explained_variance,
    gae,
    importance_weights,
    kl_estimate,
    length_adaptive_lam,
    next_kl_coef,
    policy_loss,
    r_squared,
    sampler_gap,
    shape_rewards,
    value_loss,
    whiten,
)

from .ranks import WHOLE, on_two_ranks

LN2 = math.log(2)
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)
SEEDS = st.integers(0, 2**32 - 1)


class Ragged:
    """Rows of random numbers, `lengths[b]` of them real; as loops see them (`real`), and as tensors (B, T)
    with `fill` behind the mask.
    """

    NAMES = (
        "logprobs",
        "old_logprobs",
        "ref_logprobs",
        "advantages",
        "values",
        "old_values",
        "returns",
        "rewards",
        "scores",
    )

    def __init__(self, lengths: list[int], seed: int):
        self.lengths, self.width = lengths, max(lengths) + 1
        random = np.random.default_rng(seed)
        self.arrays = {name: random.normal(0, 0.7, (len(lengths), self.width)) for name in self.NAMES}
        self.mask = torch.tensor([[t < length for t in range(self.width)] for length in lengths])

    def real(self, name: str) -> list[list[float]]:
        return [row[:length].tolist() for row, length in zip(self.arrays[name], self.lengths, strict=True)]

    def flat(self, name: str) -> list[float]:
        return [x for row in self.real(name) for x in row]

    def tensors(self, fill: tuple[float, ...] = (0.0,)) -> dict[str, Tensor]:
        behind = (
            torch.tensor(fill, dtype=torch.float64)
            .repeat(self.mask.numel())[: self.mask.numel()]
            .view(self.mask.shape)
        )
        tensors = {
            name: torch.where(self.mask, torch.from_numpy(array), behind)
            for name, array in self.arrays.items()
        }
        return tensors | {"kl": tensors["logprobs"] - tensors["ref_logprobs"]}


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-6, atol=1e-6)


def padded(rows: list[list[float]], width: int) -> list[list[float]]:
    return [row + [0.0] * (width - len(row)) for row in rows]


# Hand-worked


@pytest.mark.parametrize(("kind", "expected"), [("k1", LN2), ("k2", LN2**2 / 2), ("k3", 0.5 - 1 + LN2)])
def test_kl_estimate_by_hand(kind: Any, expected: float) -> None:
    close(kl_estimate(torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log(), kind), [[expected]])


def test_k1_and_k3_are_unbiased_and_other_kinds_are_refused() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    for kind in ("k1", "k3"):
        close(
            (p * kl_estimate(p.log(), q.log(), kind)).sum(),
            torch.nn.functional.kl_div(q.log(), p, reduction="sum"),
        )  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(p, q, "k4")  # type: ignore[arg-type]


@pytest.mark.parametrize("coef", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_each_token_gets_its_score_less_its_kl(coef: Any) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    scores = torch.tensor([[0.0, 10.0, 0.0], [3.0, 0.0, 20.0], [0.0, 0.0, 0.0]])
    close(
        shape_rewards(scores, torch.tensor([[1.0, 2.0, 9.0]] * 3), mask, coef),
        [[-0.5, 9, 0], [2.5, -1, 15.5], [0, 0, 0]],
    )


def test_rewards_inside_a_response_count_for_the_tokens_up_to_them() -> None:
    """A step that ends in the second of four tokens earns 4, and the last one −2."""
    rewards, mask = torch.tensor([[0.0, 4.0, 0.0, -2.0]]), torch.ones(1, 4, dtype=torch.bool)
    values = torch.tensor([[1.0, 2.0, -1.0, 0.0]])
    # γ = λ = 1: what is still to come (2, 2, −2, −2) less the values
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    close(returns, [[2.0, 2.0, -2.0, -2.0]])
    close(advantages, [[1.0, 0.0, -1.0, -2.0]])
    # λ = 0: one step ahead, r + v' − v
    advantages, returns = gae(rewards, values, mask, 1.0, 0.0)
    close(advantages, [[1.0, 1.0, 1.0, -2.0]])
    close(returns, [[2.0, 3.0, 0.0, -2.0]])
    # γ = λ = ½: δ = (0, 1.5, 1, −2), and a quarter of what follows
    advantages, _ = gae(rewards, values, mask, 0.5, 0.5)
    close(advantages, [[0 + 1.625 / 4, 1.5 + 0.5 / 4, 1 - 2 / 4, -2.0]])


def test_gae_by_hand() -> None:
    # δ = (1 + ½·4 − 2, 0 + ½·6 − 4, 8 − 6) = (1, −1, 2); A₂ = 2, A₁ = −1 + ¼·2, A₀ = 1 + ¼·A₁
    advantages, returns = gae(
        torch.tensor([[1.0, 0, 8]]), torch.tensor([[2.0, 4, 6]]), torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5
    )
    close(advantages, [[0.875, -0.5, 2.0]])
    close(returns, [[2.875, 3.5, 8.0]])


def test_gae_takes_a_lambda_for_each_response() -> None:
    """δ = (1, −1, 2) as above: λ = ½ gives the numbers above, and λ = 0 the differences themselves."""
    rewards, values = torch.tensor([[1.0, 0, 8]] * 2), torch.tensor([[2.0, 4, 6]] * 2)
    lam = torch.tensor([0.5, 0.0])
    advantages, returns = gae(rewards, values, torch.ones(2, 3, dtype=torch.bool), 0.5, lam)
    close(advantages, [[0.875, -0.5, 2.0], [1.0, -1.0, 2.0]])
    close(returns, [[2.875, 3.5, 8.0], [3.0, 3.0, 8.0]])


def test_the_length_adaptive_lambda_by_hand() -> None:
    """At alpha ½: 1 − 1/(½·l) is ½ at 4 tokens, 0 at 2, and −1 at one token, which becomes 0."""
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False], [False] * 4])
    close(length_adaptive_lam(mask, 0.5), [0.5, 0.0, 0.0, 0.0])
    close(length_adaptive_lam(torch.ones(1, 1000, dtype=torch.bool), 0.05), [0.98])


@pytest.mark.parametrize(("shift_mean", "expected"), [(True, [[-1, 1, 0]]), (False, [[1, 3, 0]])])
def test_whiten_by_hand(shift_mean: bool, expected: list[list[float]]) -> None:
    close(
        whiten(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]]), shift_mean), expected
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "clipped"),
    [
        (1.0, 2.0, None, -2.0, 0),
        (1.5, 2.0, None, -2.6, 1),
        (0.5, 2.0, None, -1.0, 0),
        (1.2, 2.0, None, -2.4, 0),
        (0.5, -2.0, None, 1.8, 1),
        (1.5, -2.0, None, 3.0, 0),
        (5.0, -2.0, None, 10.0, 0),
        (5.0, -2.0, 3.0, 6.0, 0),
        (2.0, -2.0, 3.0, 4.0, 0),
        (5.0, 2.0, 3.0, -2.6, 1),
    ],
)
def test_policy_loss_by_hand(
    ratio: float, advantage: float, dual_clip: float | None, loss: float, clipped: int
) -> None:
    """The ratio may fall to 0.9 and rise to 1.3; if the clip or the dual clip decides, no gradient flows."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    out = policy_loss(logprobs, zero, zero + advantage, mask, 0.1, 0.3, dual_clip)
    out.loss.backward()
    close(torch.stack(out), [loss, clipped, ratio - 1 - math.log(ratio)])
    flat = clipped or (dual_clip is not None and loss == -dual_clip * advantage)
    close(logprobs.grad, [[0.0 if flat else -advantage * ratio]])
    assert not out.clip_fraction.requires_grad
    assert not out.approx_kl.requires_grad


@pytest.mark.parametrize(
    ("value", "loss", "clipped", "gradient"),
    [
        (1.1, 0.5 * 0.9**2, 0, -0.9),
        (1.5, 0.5 * 0.8**2, 1, 0.0),
        (0.0, 0.5 * 2.0**2, 0, -2.0),
        (3.5, 0.5 * 1.5**2, 0, 1.5),
    ],
)
def test_value_loss_by_hand(value: float, loss: float, clipped: int, gradient: float) -> None:
    """v_old = 1 and R = 2, clipped to 1 ± 0.2: half the larger squared error."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    out = value_loss(values, one, 2 * one, one.bool(), 0.2)
    out.loss.backward()
    close(torch.stack(out), [loss, clipped])
    close(values.grad, [[gradient]])


def test_an_unclipped_value_loss_by_hand() -> None:
    """½ · ((3 − 2)² + (0 − 2)²) / 2, however far the values have moved; the gradient is (v − R) / 2."""
    values = torch.tensor([[3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 2, dtype=torch.float64)
    out = value_loss(values, one, 2 * one, one.bool(), None)
    out.loss.backward()
    close(torch.stack(out), [1.25, 0.0])
    close(values.grad, [[0.5, -1.0]])


def test_entropy_by_hand() -> None:
    close(
        entropy(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0], [LN2, 0.0, -1e4, -1e4]])),
        [math.log(4), 0.0, math.log(3) - 2 / 3 * LN2],
    )


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.6, 1 + 0.1 * 0.0064), (60.0, 1 + 0.2 * 0.0064), (0.0, 1 - 0.2 * 0.0064), (6.0, 1.0)]
)
def test_the_kl_coefficient_moves_to_its_target_or_stays(kl: float, factor: float) -> None:
    assert next_kl_coef(0.05, kl, 6.0, 10_000, 64) == pytest.approx(0.05 * factor, rel=1e-12)
    assert next_kl_coef(0.05, kl, None, 10_000, 64) == 0.05


def test_explained_variance_of_a_perfect_a_mean_and_a_wrong_critic() -> None:
    returns, mask = torch.tensor([[1.0, 3.0, 77.0]]), torch.tensor([[True, True, False]])
    for values, expected in (
        ([1.0, 3.0, 0.0], 1.0),
        ([2.0, 2.0, 9.0], 0.0),
        ([3.0, 1.0, 5.0], -3.0),
        ([11.0, 13.0, 0.0], 1.0),
    ):
        close(explained_variance(torch.tensor([values]), returns, mask), expected)


def test_r_squared_of_a_perfect_a_mean_and_a_biased_critic() -> None:
    returns, mask = torch.tensor([[1.0, 3.0, 77.0]]), torch.tensor([[True, True, False]])
    for values, expected in (
        ([1.0, 3.0, 0.0], 1.0),
        ([2.0, 2.0, 9.0], 0.0),
        ([2.0, 4.0, 0.0], 0.0),
        ([0.0] * 3, -4.0),
    ):
        close(r_squared(torch.tensor([values]), returns, mask), expected)


# Oracles: one real token after the other


def oracle_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, eq. 16: A_t = Σ_l (γλ)^l δ_{t+l}, the value after the last token being 0."""
    after = [*values, 0.0][1:]
    deltas = [r + gamma * a - v for r, a, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]


def oracle_policy_loss(
    data: Ragged, low: float, high: float, dual_clip: float | None
) -> tuple[float, float, float]:
    total = clipped = kl = 0.0
    tokens = list(zip(*(data.flat(name) for name in ("logprobs", "old_logprobs", "advantages")), strict=True))
    for new, old, advantage in tokens:
        ratio = math.exp(new) / math.exp(old)
        bounded = min(max(ratio, 1 - low), 1 + high)
        objective = min(ratio * advantage, bounded * advantage)
        if dual_clip is not None and advantage < 0:
            objective = max(objective, dual_clip * advantage)
        total -= objective
        clipped += bounded * advantage < ratio * advantage
        kl += ratio - 1 - (new - old)
    return total / len(tokens), clipped / len(tokens), kl / len(tokens)


def oracle_value_loss(data: Ragged, clip: float) -> tuple[float, float]:
    total = clipped = 0.0
    tokens = list(zip(*(data.flat(name) for name in ("values", "old_values", "returns")), strict=True))
    for value, old, target in tokens:
        near = min(max(value, old - clip), old + clip)
        total += max((value - target) ** 2, (near - target) ** 2) / 2
        clipped += (near - target) ** 2 > (value - target) ** 2
    return total / len(tokens), clipped / len(tokens)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SEEDS, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_rewards_and_advantages_agree_with_plain_loops(
    lengths: list[int], seed: int, gamma: float, lam: float, shift: bool
) -> None:
    data = Ragged(lengths, seed)
    x, mask, width = data.tensors(), data.mask, data.width
    rewards = [
        [score - gamma * (p - q) for p, q, score in zip(*rows, strict=True)]
        for rows in zip(*map(data.real, ("logprobs", "ref_logprobs", "scores")), strict=True)
    ]
    close(shape_rewards(x["scores"], x["kl"], mask, gamma), padded(rewards, width))

    expected = [
        oracle_gae(*rows, gamma, lam) for rows in zip(data.real("rewards"), data.real("values"), strict=True)
    ]
    advantages, returns = gae(x["rewards"], x["values"], mask, gamma, lam)
    close(advantages, padded(expected, width))
    close(
        returns,
        padded(
            [
                [a + v for a, v in zip(*rows, strict=True)]
                for rows in zip(expected, data.real("values"), strict=True)
            ],
            width,
        ),
    )

    flat = np.array(data.flat("advantages"))
    mean, spread = flat.mean(), math.sqrt(flat.var() + 1e-8)
    white = [[(v - mean) / spread + (0 if shift else mean) for v in row] for row in data.real("advantages")]
    close(whiten(x["advantages"], mask, shift), padded(white, width))


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SEEDS, st.floats(0, 1), st.floats(0.01, 2))
def test_lambda_of_each_response_agrees_with_plain_loops(
    lengths: list[int], seed: int, gamma: float, alpha: float
) -> None:
    """λ by length: sums over all later tokens, row by row. λ = 1: discounted sums. λ = 0: one step."""
    data = Ragged(lengths, seed)
    x, mask, width = data.tensors(GARBAGE), data.mask, data.width
    rows = list(zip(data.real("rewards"), data.real("values"), strict=True))
    lams = [max(0.0, 1 - 1 / (alpha * length)) if length else 0.0 for length in lengths]
    expected = [oracle_gae(*row, gamma, lam) for row, lam in zip(rows, lams, strict=True)]
    advantages, _ = gae(x["rewards"], x["values"], mask, gamma, length_adaptive_lam(mask, alpha))
    close(advantages, padded(expected, width))

    sums = [[sum(gamma**i * r for i, r in enumerate(r[t:])) for t in range(len(r))] for r, _ in rows]
    close(gae(x["rewards"], x["values"], mask, gamma, 1.0)[1], padded(sums, width))
    steps = [[a + gamma * b for a, b in zip(r, [*v, 0.0][1:], strict=True)] for r, v in rows]
    close(gae(x["rewards"], x["values"], mask, gamma, 0.0)[1], padded(steps, width))


@settings(max_examples=50, deadline=None)
@given(LENGTHS, SEEDS, st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.none() | st.floats(1.01, 4))
def test_losses_agree_with_plain_loops(
    lengths: list[int], seed: int, low: float, high: float, dual_clip: float | None
) -> None:
    data = Ragged(lengths, seed)
    x, mask = data.tensors(), data.mask
    policy = policy_loss(x["logprobs"], x["old_logprobs"], x["advantages"], mask, low, high, dual_clip)
    close(torch.stack(policy), oracle_policy_loss(data, low, high, dual_clip))
    close(
        torch.stack(value_loss(x["values"], x["old_values"], x["returns"], mask, low)),
        oracle_value_loss(data, low),
    )
    distributions = [row / row.sum() for row in np.exp(x["logprobs"].numpy())]
    close(entropy(x["logprobs"]), [-sum(p * math.log(p) for p in row) for row in distributions])
    if sum(lengths) > 1:
        returns, values = np.array(data.flat("returns")), np.array(data.flat("values"))
        close(
            explained_variance(x["values"], x["returns"], mask), 1 - (returns - values).var() / returns.var()
        )


# The mask and micro-batches


def _policy(x: dict[str, Tensor], mask: Tensor, num_tokens: Any = None) -> tuple[Tensor, ...]:
    return policy_loss(x["logprobs"], x["old_logprobs"], x["advantages"], mask, 0.1, 0.3, 2.0, num_tokens)


def _value(x: dict[str, Tensor], mask: Tensor, num_tokens: Any = None) -> tuple[Tensor, ...]:
    return value_loss(x["values"], x["old_values"], x["returns"], mask, 0.2, num_tokens)


MASKED: dict[str, Callable[[dict[str, Tensor], Tensor], tuple[Tensor, ...]]] = {
    "shape_rewards": lambda x, mask: (shape_rewards(x["scores"], x["kl"], mask, 0.1),),
    "gae": lambda x, mask: gae(x["rewards"], x["values"], mask, 0.99, 0.95),
    "whiten": lambda x, mask: (whiten(x["advantages"], mask),),
    "explained_variance": lambda x, mask: (explained_variance(x["values"], x["returns"], mask),),
    "r_squared": lambda x, mask: (r_squared(x["values"], x["returns"], mask),),
    "policy_loss": _policy,
    "value_loss": _value,
}
LOSSES = [(_policy, "logprobs"), (_value, "values")]


@pytest.mark.parametrize("name", MASKED)
def test_what_lies_behind_the_mask_changes_nothing(name: str) -> None:
    data = Ragged([3, 0, 5, 1], seed=1)
    for found, expected in zip(
        MASKED[name](data.tensors(GARBAGE), data.mask), MASKED[name](data.tensors(), data.mask), strict=True
    ):
        assert torch.equal(found, expected)
        assert found.isfinite().all()


@pytest.mark.parametrize(("loss", "leaf"), LOSSES)
def test_what_lies_behind_the_mask_gets_and_gives_no_gradient(loss: Any, leaf: str) -> None:
    data = Ragged([3, 0, 5, 1], seed=2)
    gradients = []
    for fill in ((0.0,), GARBAGE):
        x = data.tensors(fill)
        x[leaf].requires_grad_(True)
        loss(x, data.mask)[0].backward()
        gradients.append(x[leaf].grad)
    assert torch.equal(*gradients)
    assert not gradients[0][~data.mask].any()
    assert gradients[0][data.mask].any()


@settings(max_examples=25, deadline=None)
@given(LENGTHS, SEEDS, st.integers(1, 4), st.sampled_from(LOSSES))
def test_micro_batches_add_up_to_the_whole(lengths: list[int], seed: int, size: int, case: Any) -> None:
    loss, leaf = case
    data = Ragged(lengths, seed)
    whole, parts = data.tensors(), data.tensors()
    tokens = data.mask.sum()
    expected = loss(whole | {leaf: whole[leaf].requires_grad_(True)}, data.mask)
    expected[0].backward()
    parts[leaf].requires_grad_(True)
    pieces = [slice(start, start + size) for start in range(0, len(lengths), size)]
    found = [
        loss({name: tensor[rows] for name, tensor in parts.items()}, data.mask[rows], tokens)
        for rows in pieces
    ]
    for out in found:
        out[0].backward()
    close(
        torch.stack([sum(column) for column in zip(*found, strict=True)]).detach(),
        torch.stack(list(expected)).detach(),
    )  # type: ignore[arg-type]
    close(parts[leaf].grad, whole[leaf].grad)


def test_whitening_is_over_all_ranks_together(tmp_path):
    halves = on_two_ranks("pipeline.ppo.functional:whiten", tmp_path)
    torch.testing.assert_close(torch.cat(halves), whiten(WHOLE, torch.ones_like(WHOLE, dtype=torch.bool)))


# Samples of an engine

# log π − log μ of four tokens, the last of which π excludes; a fifth is behind the mask.
LOG_RATIO = torch.tensor([[LN2, -LN2, 2 * LN2], [-math.inf, math.nan, math.inf]], dtype=torch.float64)
SAMPLED = torch.tensor([[True, True, True], [True, False, False]])


def test_importance_weights_are_cut_at_the_cap() -> None:
    close(importance_weights(LOG_RATIO, SAMPLED, 3.0), [[2.0, 0.5, 3.0], [0.0, 0.0, 0.0]])
    close(importance_weights(LOG_RATIO, SAMPLED, 1.5), [[1.5, 0.5, 1.5], [0.0, 0.0, 0.0]])


def test_the_gap_of_a_sampler_by_hand() -> None:
    """k3 of the ratios 2, 1/2 and 4 is 1 − ln 2, ln 2 − 1/2 and 3 − 2 ln 2."""
    gap = sampler_gap(LOG_RATIO, SAMPLED, 2.0)
    expected = [4 / 3 * LN2, 2 * LN2, (3.5 - 2 * LN2) / 3, 0.25, 0.25]
    assert list(map(float, gap)) == pytest.approx(expected)
    assert float(sampler_gap(LOG_RATIO, SAMPLED, None).capped) == 0.0


def test_a_sampler_whose_tokens_are_all_excluded_has_finite_metrics() -> None:
    gap = sampler_gap(torch.full((1, 2), -math.inf), torch.ones(1, 2, dtype=torch.bool), 2.0)
    assert list(map(float, gap)) == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_weights_multiply_the_policy_loss_and_not_its_metrics() -> None:
    """Three tokens of ratio 2, clipped at 1.2: the losses are −1.2, 4 and −6."""
    old = torch.zeros(1, 3)
    advantages, mask = torch.tensor([[1.0, -2.0, 5.0]]), torch.ones(1, 3, dtype=torch.bool)
    weights = torch.tensor([[0.5, 2.0, 0.0]])
    plain = policy_loss(old + LN2, old, advantages, mask, 0.2, 0.2)
    found = policy_loss(old + LN2, old, advantages, mask, 0.2, 0.2, weights=weights)
    close(plain.loss, (-1.2 + 4.0 - 6.0) / 3)
    close(found.loss, (-0.6 + 8.0 + 0.0) / 3)
    assert torch.equal(found.clip_fraction, plain.clip_fraction)
    assert torch.equal(found.approx_kl, plain.approx_kl)
