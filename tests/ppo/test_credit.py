"""Credit inside a response, in a world where all of it is known by enumeration.

A response is one or two tokens of three: token 2 ends it, and after two tokens it is cut. Every token has a
reward. The seven responses are enumerated with their probabilities, so that expectations are exact. The last
test follows values and rewards through the trainer, token by token.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models.chat import pad_rows, prompt_ids
from pipeline.models.generation import Responses
from pipeline.models.loading import load_policy
from pipeline.ppo.functional import gae, kl_estimate, length_adaptive_lam, shape_rewards

from .test_trainer import PROMPTS, trainer_of

END = 2
RESPONSES = [(END,), *((a, b) for a, b in product((0, 1), range(3)))]
GAMMA = 0.9
MASK = torch.tensor([[True, len(response) > 1] for response in RESPONSES])
REWARDS = torch.tensor([0.3, -1.0, 2.0, 0.7, -0.4, 1.5, 0.1], dtype=torch.float64)  # of each last token
EARLY = torch.tensor([0.0, 0.5, -0.8], dtype=torch.float64)  # of a first token that is not the last


class Policy:
    """A policy by its logits, `scale` times random ones: of the first token (3,), the second (2, 3)."""

    def __init__(self, seed: int, scale: float = 1.0):
        random = torch.Generator().manual_seed(seed)
        self.first = (scale * torch.randn(3, generator=random, dtype=torch.float64)).requires_grad_()
        self.second = (scale * torch.randn(2, 3, generator=random, dtype=torch.float64)).requires_grad_()

    def logprobs(self) -> Tensor:
        """(7, 2) log-probabilities of the tokens of all responses, 0 off the mask."""
        second = self.second.log_softmax(-1)
        rows = [[self.first.log_softmax(-1)[a], *(second[a, b] for b in rest)] for a, *rest in RESPONSES]
        return torch.stack([torch.stack([*row, torch.zeros_like(row[0])][:2]) for row in rows])

    def gradient(self, scalar: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, (self.first, self.second))])


def token_scores() -> Tensor:
    """(7, 2) rewards inside the responses."""
    scores = torch.zeros(7, 2, dtype=torch.float64)
    for row, response in enumerate(RESPONSES):
        scores[row, len(response) - 1] = REWARDS[row]
        if len(response) > 1:
            scores[row, 0] = EARLY[1 + response[0]]
    return scores


def exact(policy: Policy, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(7, 2) values of the states in which the tokens are chosen, and values Q of these choices."""
    probs, first = policy.second.softmax(-1).detach(), policy.first.softmax(-1).detach()
    after = [float((probs[a] * rewards[1 + 3 * a : 4 + 3 * a, 1]).sum()) for a in (0, 1)]  # V after a token
    q_first = [float(rewards[1 + 3 * a, 0]) + GAMMA * after[a] for a in (0, 1)] + [float(rewards[0, 0])]
    start = sum(float(p) * q for p, q in zip(first, q_first, strict=True))
    values, choices = torch.zeros(7, 2, dtype=torch.float64), torch.zeros(7, 2, dtype=torch.float64)
    for row, response in enumerate(RESPONSES):
        values[row, 0], choices[row, 0] = start, q_first[response[0]]
        if len(response) > 1:
            values[row, 1], choices[row, 1] = after[response[0]], rewards[row, 1]
    return values, choices


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0, length_adaptive_lam(MASK, 1.0)])
def test_with_exact_values_advantages_are_unbiased_at_any_lambda(lam: Any) -> None:
    """Given a state and the token chosen in it, the mean over what follows is Q − V.

    A λ by the length is unbiased here because the first token alone decides the length.
    """
    policy = Policy(3)
    rewards = shape_rewards(token_scores(), torch.zeros(7, 2).double(), MASK, 0.0)
    values, choices = exact(policy, rewards)
    advantages, returns = gae(rewards, values, MASK, GAMMA, lam)
    expected = choices - values
    torch.testing.assert_close(advantages[:, 1], expected[:, 1])
    torch.testing.assert_close(advantages[0], expected[0])
    for a in (0, 1):  # over the second token
        rows, probs = slice(1 + 3 * a, 4 + 3 * a), policy.second[a].softmax(-1).detach()
        torch.testing.assert_close((probs * advantages[rows, 0]).sum(), expected[rows, 0][0])
        torch.testing.assert_close((probs * returns[rows, 0]).sum(), choices[rows, 0][0])


def policy_gradient(policy: Policy, rewards: Tensor) -> Tensor:
    """The expected gradient by which PPO climbs `rewards`, which it takes as constants; values are 0."""
    logprobs = policy.logprobs()
    advantages, _ = gae(rewards.detach(), torch.zeros(7, 2).double(), MASK, 1.0, 1.0)
    probs = logprobs.sum(1).exp().detach()
    return policy.gradient((probs * (logprobs * advantages).sum(1)).sum())


def penalty_gradient(policy: Policy, reference: Policy, kind: Any) -> Tensor:
    kl = kl_estimate(policy.logprobs(), reference.logprobs(), kind)
    return -policy_gradient(policy, shape_rewards(torch.zeros(7, 2), kl, MASK, 1.0))


def kl(policy: Policy, reference: Policy) -> Tensor:
    p, q = policy.logprobs().sum(1), reference.logprobs().sum(1)
    return (p.exp() * (p - q)).sum()


def test_the_policy_gradient_is_that_of_the_expected_rewards() -> None:
    policy, scores = Policy(3), token_scores()
    expected = (policy.logprobs().sum(1).exp() * scores.sum(1)).sum()
    torch.testing.assert_close(policy_gradient(policy, scores), policy.gradient(expected))


def test_as_a_penalty_in_the_reward_k1_alone_has_the_gradient_of_the_kl() -> None:
    policy, reference = Policy(3), Policy(4)
    expected = policy.gradient(kl(policy, reference))
    torch.testing.assert_close(penalty_gradient(policy, reference, "k1"), expected)
    for kind in ("k2", "k3"):
        error = penalty_gradient(policy, reference, kind) - expected
        assert float(error.norm() / expected.norm()) > 0.3


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_near_the_reference_k2_and_k3_in_the_reward_hardly_pull_back(kind: Any) -> None:
    """Their values are of second order there, so the gradient vanishes against that of the KL."""
    reference = Policy(3, 0.0)
    pulls = []
    for distance in (1e-2, 1e-3):
        policy = Policy(3, distance)
        kl_gradient = policy.gradient(kl(policy, reference))
        pulls.append(float(penalty_gradient(policy, reference, kind).norm() / kl_gradient.norm()))
    assert pulls[0] < 0.02
    assert pulls[1] == pytest.approx(pulls[0] / 10, rel=0.05)


def ragged(policy: Any, tokenizer: Any, prompts: list[list[int]], noise: Tensor, **_: Any) -> Responses:
    """Responses of 1, 2, 3, … tokens; every other one has no EOS."""
    ids = [[5 + row] * row + [7 if row % 2 else tokenizer.eos_token_id] for row in range(len(prompts))]
    tensors = (*pad_rows(prompts, 0, side="left"), *pad_rows(ids, 0))
    return Responses(*tensors, tokenizer.batch_decode(ids), [row % 2 == 0 for row in range(len(ids))])


def test_each_token_gets_the_value_of_its_state_and_the_rewards_from_it_on(
    tiny_gpt2, tiny_tokenizer, tmp_path
):
    """Values of unpadded prefixes, one by one; rewards 1, 2, 3, … of tokens, 0.5 less without an EOS."""

    def counting(completion_ids, **_):
        return [[float(t + 1) for t in range(len(ids))] for ids in completion_ids]

    policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
    options = {"gamma": 0.5, "lam": 0.0, "lam_value": 1.0, "missing_eos_penalty": 0.5}
    trainer = trainer_of(policy, tiny_tokenizer, tmp_path, counting, **options)
    trainer.generate = ragged
    torch.nn.init.normal_(trainer.actor.value_head.weight)
    rollout = trainer.collect(0)

    advantages, mask = torch.zeros_like(rollout.values), rollout.mask
    rows = trainer._prompt_indices(list(range(len(mask))))
    for row, number in enumerate(rows):
        query = prompt_ids(tiny_tokenizer, PROMPTS[number]["prompt"])
        response = rollout.responses.response_ids[row][mask[row]].tolist()
        rewards = [float(t + 1) for t in range(len(response))]
        rewards[-1] -= 0.5 if row % 2 else 0.0
        values = []
        for t in range(len(response)):
            prefix = torch.tensor([query + response[:t]])
            with torch.no_grad():
                state = policy(prefix, output_hidden_states=True).hidden_states[-1][0, -1]
                values.append(float(trainer.actor.value_head(state)))
        for t, after in enumerate([*values[1:], 0.0]):
            assert float(rollout.values[row, t]) == pytest.approx(values[t], abs=1e-4)
            discounted = sum(0.5**i * reward for i, reward in enumerate(rewards[t:]))
            assert float(rollout.returns[row, t]) == pytest.approx(discounted, abs=1e-4)
            advantages[row, t] = rewards[t] + 0.5 * after - values[t]
    white = (advantages - advantages[mask].mean()) / advantages[mask].std(correction=0)
    torch.testing.assert_close(rollout.advantages[mask], white[mask], atol=1e-4, rtol=1e-4)
