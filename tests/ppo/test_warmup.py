"""The critic's warm-up: when it ends, and that nothing but the critic learns in it."""

import math

import pytest
import torch

from pipeline.ppo import functional
from pipeline.ppo.warmup import MIN_RISE, describe_end, initial_warmup, next_warmup

from .test_trainer import trainer_of

# R² of each rollout, and when a warm-up of at most 6 rollouts ends with a patience of 2.
COURSES = {
    "it stops rising": ([0.0, 0.2, 0.3, 0.3, 0.3 + MIN_RISE / 2, 0.9], 5),
    "it rises again": ([0.0, 0.2, 0.1, 0.3, 0.2, 0.4], 6),
    "it rises slowly": ([0.0, 0.004, 0.008, 0.012, 0.016, 0.02], 6),
    "it never rises": ([-3.0, -4.0, -5.0, 0.0, 0.0, 0.0], 3),
    "it is no number": ([0.1, math.nan, math.nan, 0.5, 0.5, 0.5], 3),
}


@pytest.mark.parametrize("course", COURSES)
def test_it_ends_once_r_squared_has_stopped_rising(course):
    explained, end = COURSES[course]
    state, lines = initial_warmup(6), []
    for rollout, value in enumerate(explained):
        if rollout < state[-1]:
            state = next_warmup(state, value, rollout, patience=2)
            metrics = {"val/r_squared": value, "val/explained_variance": 0.1234}
            lines.append(describe_end(state, metrics, rollout, patience=2))
    assert state[-1] == end == len(lines)
    assert next_warmup(state, 1.0, end, patience=2) is state
    assert lines[:-1] == [None] * (end - 1)
    assert f"rollout {end - 1}: the critic's warm-up ends" in lines[-1]
    assert f"the policy learns from rollout {end}" in lines[-1]
    assert ("may still rise" in lines[-1]) == (end == 6)


def oddness(completion_ids, **_):
    return [float(sum(token % 2 for token in ids)) for ids in completion_ids]


@pytest.fixture
def make(tiny_gpt2, tiny_tokenizer, tmp_path):
    from pipeline.models.loading import load_policy

    def trainer(**more):
        torch.manual_seed(0)
        policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
        settings = {"critic_warmup_rollouts": 3, "critic_warmup_patience": 2, "kl_target": 0.1}
        return trainer_of(policy, tiny_tokenizer, tmp_path, oddness, **settings | more)

    return trainer


def policy_of(trainer):
    return {name: value.clone() for name, value in trainer.actor.policy.state_dict().items()}


def test_the_policy_its_optimizer_and_the_kl_coefficient_stay(make):
    trainer = make(num_rollouts=3, weight_decay=0.1)
    before = policy_of(trainer)
    trainer.train()
    after = policy_of(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(trainer.optimizer.state) == set(trainer.actor.value_head.parameters())
    assert float(trainer.actor.kl_coef) == 0.05
    assert not torch.equal(trainer.actor.value_head.weight, torch.zeros(1, 32))


def test_it_fits_monte_carlo_returns_without_a_clip_and_then_those_of_the_options(make, monkeypatch):
    clips, original = [], functional.value_loss
    monkeypatch.setattr(functional, "value_loss", lambda *a, **k: (clips.append(a[4]), original(*a, **k))[1])
    trainer = make(num_rollouts=2, critic_warmup_rollouts=1, lam=0.0, gamma=0.9, kl_coef=0.0)
    returns, collect = [], trainer.collect
    trainer.collect = lambda number: (returns.append(collect(number)), returns[-1])[1]
    trainer.train()
    first, second = returns
    last = first.mask.sum(1) - 1
    rows = range(len(last))
    for row in rows:
        for t in range(int(last[row]) + 1):
            discounted = float(first.scores[row]) * 0.9 ** float(last[row] - t)
            assert float(first.returns[row, t]) == pytest.approx(discounted, rel=1e-5)
    bootstrapped = 0.9 * second.values[:, 1:]  # lam 0: the next value, but on the last token
    inside = second.mask[:, 1:]
    torch.testing.assert_close(second.returns[:, :-1][inside], bootstrapped[inside])
    steps = trainer.args.steps_per_rollout * trainer.args.gradient_accumulation_steps
    assert clips == [None] * steps + [0.2] * steps


def test_it_goes_on_while_the_critic_learns_the_mean(make):
    """Rewards are about 4, far from 0, so the critic learns its mean first, which R² shows."""
    large = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "num_ppo_epochs": 4}
    trainer = make(num_rollouts=4, critic_warmup_patience=1, learning_rate=0.01, **large)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "val/r_squared" in entry]
    fits = [entry["val/r_squared"] for entry in entries]
    assert fits[0] < fits[1] - 0.1 < fits[2] - 0.2
    assert [entry["val/critic_warmup"] for entry in entries[:3]] == [1.0] * 3
    assert all(abs(entry["val/explained_variance"]) < 0.3 for entry in entries[:3])


def test_the_log_shows_when_it_ended(make, monkeypatch, capsys):
    """Rollout 0 explains nothing, rollout 1 explains 0.4, and then nothing is gained in 2."""
    explained = iter([0.0, 0.4, 0.3, 0.35, 0.9, 0.9])
    monkeypatch.setattr(functional, "r_squared", lambda *_: next(explained))
    trainer = make(num_rollouts=6, critic_warmup_rollouts=9)
    trainer.train()
    logs = [entry["val/critic_warmup"] for entry in trainer.state.log_history if "val/critic_warmup" in entry]
    assert logs == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    kls = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    assert [kl == 0.0 for kl in kls] == [True] * 5 + [False]
    coefs = [
        entry["objective/kl_coef"] for entry in trainer.state.log_history if "objective/kl_coef" in entry
    ]
    assert [coef == pytest.approx(0.05, rel=1e-7) for coef in coefs] == [True] * 5 + [False]
    printed = capsys.readouterr().out
    assert printed.count("rollout 3: the critic's warm-up ends; ") == printed.count("warm-up ends") == 1
    assert (
        "and its R² 0.350; the best R², 0.400, is 2 rollouts old; the policy learns from rollout 4" in printed
    )


def test_without_a_patience_it_is_the_number_that_is_given(make):
    trainer = make(num_rollouts=3, critic_warmup_patience=None, critic_warmup_rollouts=2)
    before = policy_of(trainer)
    trainer.train()
    kls = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    assert "critic_warmup" not in trainer.actor.state_dict()
    assert not any("val/critic_warmup" in entry for entry in trainer.state.log_history)
    assert kls == [0.0, 0.0, 0.0]  # before each rollout's update, and the third was the first of the policy
    assert any(not torch.equal(value, before[name]) for name, value in policy_of(trainer).items())
