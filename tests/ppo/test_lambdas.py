"""The λ of the policy and of the critic, by the definition of the estimator."""

import torch

from pipeline.models.chat import pad_rows
from pipeline.models.generation import Responses
from pipeline.ppo.functional import gae, whiten


def ragged(policy, tokenizer, prompts, noise, **_):
    """Responses of 1, 2, 3, … tokens."""
    ids = [[5 + row] * row + [tokenizer.eos_token_id] for row in range(len(prompts))]
    queries, responses = pad_rows(prompts, 0, side="left"), pad_rows(ids, 0)
    return Responses(*queries, *responses, tokenizer.batch_decode(ids), [True] * len(ids))


def learned_from(make, monkeypatch, **more):
    """A rollout, and the rewards and values from which its advantages and returns came."""
    from pipeline.ppo import functional

    given, original = [], functional.gae
    monkeypatch.setattr(functional, "gae", lambda *a: (given.append(a), original(*a))[1])
    trainer = make(gamma=0.9, **more)
    torch.nn.init.normal_(trainer.actor.value_head.weight)
    rollout = trainer.collect(0)
    monkeypatch.undo()
    return rollout, given[0][:3]


def test_the_policy_and_the_critic_have_a_lambda_each(make, monkeypatch):
    rollout, (rewards, values, mask) = learned_from(make, monkeypatch, lam=0.3, lam_value=1.0)
    expected = whiten(gae(rewards, values, mask, 0.9, 0.3)[0], mask)
    assert torch.equal(rollout.advantages, expected)
    assert torch.equal(rollout.returns, gae(rewards, values, mask, 0.9, 1.0)[1])
    same, _ = learned_from(make, monkeypatch, lam=0.3)
    assert torch.equal(same.advantages, expected)
    assert torch.equal(same.returns, gae(rewards, values, mask, 0.9, 0.3)[1])


def test_the_policys_lambda_can_grow_with_the_length(make, monkeypatch):
    options = {"lam": 0.3, "lam_length": 0.5, "generate": ragged}
    rollout, (rewards, values, mask) = learned_from(make, monkeypatch, **options)
    rows = [
        gae(rewards[i:][:1], values[i:][:1], mask[i:][:1], 0.9, max(0.0, 1 - 2 / n))
        for i, n in enumerate(mask.sum(1).tolist())
    ]
    assert mask.sum(1).tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(rollout.advantages, whiten(torch.cat([row[0] for row in rows]), mask))
    assert torch.equal(rollout.returns, gae(rewards, values, mask, 0.9, 0.3)[1])
