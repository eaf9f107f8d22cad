"""Truncated log-probabilities, against numbers worked by hand and against the sampler."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Scratch
from pipeline.models import truncation as module
from pipeline.models.generation import generate
from pipeline.models.scratch import new_policy
from pipeline.models.truncation import Truncation, truncated_logprobs

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def probabilities(truncation: Truncation, step: int = 0, temperature: float = 1.0) -> list[float]:
    """The probability of each of the four tokens."""
    rows = LOGITS.expand(4, 4)
    steps = torch.full((4,), step)
    return truncated_logprobs(rows, torch.arange(4), steps, temperature, truncation).exp().tolist()


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        (Truncation(), [0.5, 0.25, 0.15, 0.1]),
        (Truncation(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Truncation(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (Truncation(top_p=0.8), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        (Truncation(top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0]),  # of three tokens the first two are 83 %
        (Truncation(forbidden=(0,)), [0, 0.5, 0.3, 0.2]),
        (Truncation(top_k=2, forbidden=(0,)), [0, 0.625, 0.375, 0]),
    ],
)
def test_what_is_left_has_the_probability_of_all(truncation: Truncation, expected: list[float]) -> None:
    assert probabilities(truncation) == pytest.approx(expected)
    assert truncation.is_full == (truncation == Truncation())


def test_no_end_comes_before_the_minimum_length() -> None:
    truncation = Truncation(min_response_tokens=2, ends=(0, 3))
    assert not truncation.is_full
    for step in (0, 1):
        assert probabilities(truncation, step) == pytest.approx([0, 0.625, 0.375, 0])
    assert probabilities(truncation, 2) == pytest.approx([0.5, 0.25, 0.15, 0.1])


def test_the_temperature_comes_before_top_p() -> None:
    """At temperature 1/2 the probabilities are as 100 : 25 : 9 : 4, and 90 % are in two tokens."""
    assert probabilities(Truncation(top_p=0.9), temperature=0.5) == pytest.approx([0.8, 0.2, 0, 0])


@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.floats(0.05, 1), st.floats(0.3, 3))
def test_it_agrees_with_a_loop_over_sorted_tokens(
    seed: int, top_k: int, top_p: float, temperature: float
) -> None:
    logits = 2 * torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(6).repeat(3)
    found = truncated_logprobs(
        logits.repeat_interleave(6, 0), ids, 0 * ids, temperature, Truncation(top_k, top_p)
    )
    for row, values in zip(logits.tolist(), found.view(3, 6).exp().tolist(), strict=True):
        mass = [math.exp(value / temperature) for value in row]
        order = sorted(range(6), key=lambda i, mass=mass: -mass[i])[: top_k or 6]
        total, kept, before = sum(mass[i] for i in order), [], 0.0
        for i in order:
            if before / total < top_p - 1e-9 or not kept:
                kept.append(i)
            before += mass[i]
        expected = [mass[i] / sum(mass[j] for j in kept) if i in kept else 0.0 for i in range(6)]
        assert values == pytest.approx(expected, abs=1e-9)


def test_chunks_change_no_number_and_the_logits_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, ids, steps = torch.randn(7, 10), torch.randint(10, (7,)), torch.arange(7)
    given = (logits, ids, steps, 0.7, Truncation(4, 0.8, 3, (2, 5), (9,)))
    before = logits.clone()
    whole = truncated_logprobs(*given)
    monkeypatch.setattr(module, "CHUNK", 20)
    assert torch.equal(truncated_logprobs(*given), whole)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 30, "top_p": 0.7, "min_response_tokens": 1}],
    ids=["top-k", "top-p", "all"],
)
def test_the_sampler_draws_from_it(options: dict[str, float]) -> None:
    """Of uniform numbers at equal distances each token gets as many as its probability says, to a row."""
    torch.manual_seed(0)
    policy, tokenizer = new_policy(
        ["the cat sat"], Scratch(layers=1, width=16, heads=2, vocabulary=260), "\n"
    )
    torch.nn.init.normal_(policy.transformer.wte.weight, std=0.2)
    prompt, rows = [5, 17, 40], 500
    numbers = (torch.arange(rows)[:, None] + 0.5) / rows
    sampled = generate(policy, tokenizer, [prompt] * rows, numbers, 0.7, batch_size=rows, **options)
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[0, -1]
    size = len(logits)
    truncation = Truncation(**options, ends=(tokenizer.eos_token_id,))
    logprobs = truncated_logprobs(
        logits.expand(size, size), torch.arange(size), torch.zeros(size), 0.7, truncation
    )
    counts = torch.bincount(sampled.response_ids[:, 0], minlength=size)
    assert (counts - rows * logprobs.exp()).abs().max() <= 1.01
    assert counts[logprobs.isinf()].sum() == 0
    assert 3 < (counts > 0).sum() < size // 2
