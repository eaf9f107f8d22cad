"""Best-of-n against every draw there is, win rates and variety by hand."""

from itertools import combinations
from math import log
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.statistics import (
    best_of_n_means,
    distinct_ngrams,
    fit_curves,
    kl_bound,
    length_correlation,
    overoptimization_curve,
    win_rate,
)


@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=5, max_size=5, unique=True), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_best_of_n_is_the_mean_over_every_draw(prompts, n):
    rewards = [reward for prompt in prompts for reward in prompt]
    gold = [7.0 - reward**2 for reward in rewards]
    draws = [
        max(draw, key=rewards.__getitem__)
        for i in range(0, len(rewards), 5)
        for draw in combinations(range(i, i + 5), n)
    ]
    found = best_of_n_means(rewards, {"reward": rewards, "gold": gold}, 5, n)
    assert found["reward"].mean() == pytest.approx(fmean(rewards[i] for i in draws), abs=1e-9)
    assert found["gold"].mean() == pytest.approx(fmean(gold[i] for i in draws), abs=1e-9)


def test_the_bound_on_kl():
    assert kl_bound(1) == 0
    assert kl_bound(16) == pytest.approx(2.7725887 - 15 / 16)


def test_win_rate_by_hand():
    found = win_rate([1, 2, 3, 0], [0, 2, 1, 1], [5, 5, 5, 5], [5, 5, 5, 5])
    assert found["rate"] == 0.625  # two won, one tie, one lost
    assert found["length_controlled"] == pytest.approx(0.625, abs=1e-4)  # all are as long as their rivals
    assert found["interval"][0] < 0.625 < found["interval"][1]
    assert "length_controlled" not in win_rate([1, 1], [0, 0], [2, 2], [1, 1])
    assert "length_controlled" not in win_rate(
        [1, 0], [0, 1], [9, 8], [2, 2]
    )  # all are longer: of equal lengths nothing is known


def test_what_length_wins_is_controlled_for():
    """Answers win where they are longer and lose where they are shorter; three in four are longer."""
    rng = np.random.default_rng(0)
    longer = np.where(rng.random(2000) < 0.75, 10, -10)
    won = rng.random(2000) < np.where(longer > 0, 0.8, 0.2)
    found = win_rate(won.astype(float), np.full(2000, 0.5), 50 + longer, np.full(2000, 50))
    assert found["rate"] == pytest.approx(0.65, abs=0.03)
    assert found["length_controlled"] == pytest.approx(0.5, abs=0.03)


def test_distinct_n_grams():
    assert distinct_ngrams(["a b a", "a b"], 1) == 2 / 5
    assert distinct_ngrams(["a b a", "a b"], 2) == 2 / 3
    assert distinct_ngrams(["a"], 2) == 0.0


def test_reward_and_length_are_correlated_within_prompts():
    """Among the answers to a prompt the longer is the worse, though the prompt with longer answers has the
    better ones.
    """
    assert length_correlation([2, 1, 9, 8], [1, 2, 11, 12], 2) == pytest.approx(-1)
    assert length_correlation([1, 2, 3, 1, 5, 3], [1, 2, 3, 7, 7, 7], 3) == pytest.approx(2 / (2 * 10) ** 0.5)
    assert length_correlation([1, 2], [3, 4], 1) is None


def test_the_fits_are_gao_et_als_forms():
    """Points made from α = 1.5, β = 0.5 and a start of 0.2 give them back; a line with two points has no fit,
    nor a reward nobody has.
    """
    start = {"name": "SFT", "kl": 0.0, "reward": 0.0, "gold_reward": 0.2, "scorer_reward": None}
    sampled = [
        {"name": f"best-of-{n}", "line": "best-of-n", "kl": n**2, "gold_reward": 0.2 + n * (1.5 - 0.5 * n)}
        for n in (1, 2, 3)
    ]
    trained = [
        {"name": f"step {n}", "line": "PPO", "kl": n**2, "gold_reward": 0.2 + n * (1.5 - 0.5 * log(n))}
        for n in (1, 2)
    ]
    last = {"name": "PPO", "kl": 9.0, "gold_reward": 0.2 + 3 * (1.5 - 0.5 * log(3))}
    found = fit_curves([start, *sampled, *trained, last])
    assert found == {
        line: {"gold_reward": pytest.approx({"start": 0.2, "alpha": 1.5, "beta": 0.5})}
        for line in ("best-of-n", "PPO")
    }
    assert fit_curves([start, *sampled, *trained]).keys() == {"best-of-n"}
    assert overoptimization_curve(2.0, 1.5, 0.5, "best-of-n") == pytest.approx(1.0)
    assert overoptimization_curve(2.0, 1.5, 0.5, "PPO") == pytest.approx(3 - log(2))
    assert overoptimization_curve(0.0, 1.5, 0.5, "PPO") == 0
