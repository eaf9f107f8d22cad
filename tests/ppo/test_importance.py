"""Importance weights of tokens that an engine sampled: the expected gradient of an enumerated policy, and
`PPOTrainer` with a sampler that is off by known amounts.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models import generation, logprobs
from pipeline.models.generation import Responses
from pipeline.models.loading import load_policy
from pipeline.models.logprobs import response_logprobs
from pipeline.models.truncation import Truncation, truncated_logprobs
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.functional import importance_weights, policy_loss
from pipeline.ppo.trainer import PPOTrainer

# The expected gradient

V = 4  # tokens of a policy whose responses have two
TEMPERATURE = 0.8
SEED = 47
TRUNCATIONS = {
    "full": Truncation(),
    "top-k": Truncation(top_k=3),
    "top-p": Truncation(top_p=0.85),
    "minimum length": Truncation(min_response_tokens=1, ends=(3,)),
}


class Enumerated:
    """A policy by a table of logits: one row for the first token, and one after each first token.

    `sampler` is the table of an engine, which is off: its logits are shifted. The seed is one with which it
    can draw all that the policy can, and with top-p more.
    """

    def __init__(self, truncation: Truncation) -> None:
        torch.manual_seed(SEED)
        self.table = torch.randn(1 + V, V, dtype=torch.float64)
        self.sampler = self.table + 0.6 * torch.randn(1 + V, V, dtype=torch.float64)
        self.advantages = torch.randn(1 + V, V, dtype=torch.float64)
        self.truncation = truncation
        first, second = torch.cartesian_prod(torch.arange(V), torch.arange(V)).T
        self.states = torch.stack([torch.zeros_like(first), 1 + first], 1)  # (V², 2)
        self.tokens = torch.stack([first, second], 1)

    def logprobs(self, table: Tensor, truncation: Truncation) -> Tensor:
        """(V², 2) log-probabilities of both tokens of each response."""
        steps = torch.arange(2).repeat(V * V)
        logits = table[self.states.flatten()]
        return truncated_logprobs(logits, self.tokens.flatten(), steps, TEMPERATURE, truncation).view(-1, 2)

    def gradient(self, trainer_truncation: Truncation | None, sampler: Tensor) -> Tensor:
        """The gradient that PPO expects over all responses of the sampler, by the table of the policy.

        With a `trainer_truncation` the loss has importance weights, of which none is cut.
        """
        mu = self.logprobs(sampler, self.truncation)
        table = self.table.clone().requires_grad_()
        full = (table / TEMPERATURE).log_softmax(-1)[self.states, self.tokens]
        probability = mu.sum(1).exp()
        mask = (probability > 0)[:, None].expand(-1, 2)  # what the sampler never draws has no weight
        weights = None
        if trainer_truncation is not None:
            log_ratio = self.logprobs(self.table, trainer_truncation) - mu
            weights = importance_weights(log_ratio, mask, 1e9)
        advantages = self.advantages[self.states, self.tokens]
        losses = [
            policy_loss(
                *(x[[i]] for x in (full, full.detach(), advantages, mask)),
                0.2,
                0.2,
                num_tokens=1,
                weights=None if weights is None else weights[[i]],
            ).loss
            for i in range(V * V)
        ]
        (probability * torch.stack(losses)).sum().backward()
        assert table.grad is not None
        return table.grad

    def right(self, sampler: Tensor) -> Tensor:
        """The policy gradient by hand: −Σ d(s) Σ π(a|s) A(s, a) ∇ log π(a|s), with d(s) of the sampler.

        π(a|s), by which a token is chosen, is truncated, and ∇ log π is that of all tokens, as PPO's is.
        """
        mu = self.logprobs(sampler, self.truncation).exp()
        pi = self.logprobs(self.table, self.truncation).exp()
        gradient = torch.zeros_like(self.table)
        full = (self.table / TEMPERATURE).softmax(-1)
        for (_, state), (first, second), d, p in zip(self.states, self.tokens, mu, pi, strict=True):
            one_hot = torch.eye(V, dtype=torch.float64)
            if second == 0:  # the first token once, whatever follows it
                gradient[0] -= p[0] * self.advantages[0, first] * (one_hot[first] - full[0]) / TEMPERATURE
            gradient[state] -= (
                d[0] * p[1] * self.advantages[state, second] * (one_hot[second] - full[state]) / TEMPERATURE
            )
        return gradient


@pytest.mark.parametrize("truncation", TRUNCATIONS.values(), ids=TRUNCATIONS.keys())
def test_the_weights_make_the_expected_gradient_of_a_shifted_sampler_right(truncation: Truncation) -> None:
    policy = Enumerated(truncation)
    right = policy.right(policy.sampler)
    torch.testing.assert_close(policy.gradient(truncation, policy.sampler), right)
    uncorrected = policy.gradient(None, policy.sampler)
    assert float((uncorrected - right).norm() / right.norm()) > 0.05


@pytest.mark.parametrize("name", ["top-k", "top-p", "minimum length"])
def test_weights_without_the_samplers_truncation_are_wrong_even_if_it_is_not_shifted(name: str) -> None:
    policy = Enumerated(TRUNCATIONS[name])
    right = policy.right(policy.table)
    torch.testing.assert_close(policy.gradient(None, policy.table), right)
    torch.testing.assert_close(policy.gradient(TRUNCATIONS[name], policy.table), right)
    biased = policy.gradient(Truncation(), policy.table)
    assert float((biased - right).norm() / right.norm()) > 0.05


# PPOTrainer

PROMPTS = Dataset.from_list(
    [{"prompt": p} for p in ("Tell me the capital of Italy.", "Name the colour of snow.", "Hello.", "Why?")]
)
OFF = (math.log(4), -math.log(2))  # log π − log μ of even and of odd tokens: weights 2 (cut) and 1/2


def evenness(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def engine(
    even: float = 0.0, odd: float = 0.0, ends: tuple[int, ...] = (), **truncated: Any
) -> Callable[..., Responses]:
    """A sampler whose log-probabilities are the policy's less `even` or `odd`, by the token."""

    def sample(policy: Any, tokenizer: Any, prompts: Any, noise: Tensor, **options: Any) -> Responses:
        found = generation.generate(policy, tokenizer, prompts, noise, **options)
        found.sampler_logprobs = torch.zeros(found.response_ids.shape)
        truncation = Truncation(**truncated, ends=ends) if truncated else None
        for row, (query, ids) in enumerate(zip(prompts, found.token_lists(), strict=True)):
            tensors = (torch.tensor([query]), torch.tensor([ids]))
            inputs = [x for tensor in tensors for x in (tensor, torch.ones_like(tensor))]
            with torch.no_grad():
                stats = response_logprobs(policy, *inputs, options["temperature"], truncation)
            logprobs = stats.logprobs if stats.truncated is None else stats.truncated
            off = torch.tensor([odd if token % 2 else even for token in ids])
            found.sampler_logprobs[row, : len(ids)] = (logprobs[0] - off).clamp_max(0)
        return found

    return sample


@pytest.fixture
def make(tiny_gpt2: Any, tiny_tokenizer: Any, tmp_path: Any) -> Callable[..., PPOTrainer]:
    def trainer(generate: Callable[..., Responses] = generation.generate, **more: Any) -> PPOTrainer:
        settings = {
            "num_rollouts": 2,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "response_tokens": 6,
            "learning_rate": 1e-3,
            "score_normalization": "none",
            "missing_eos_penalty": 0.0,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        args = PPOConfig(output_dir=str(tmp_path / "work"), **settings | more)
        torch.manual_seed(0)
        policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
        return PPOTrainer(policy, evenness, args, PROMPTS, tiny_tokenizer, generate=generate)

    return trainer


def trained(trainer: PPOTrainer) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights in the end, and the log without times."""
    trainer.train()
    log = [
        {k: v for k, v in entry.items() if not k.startswith(("time/", "tokens_per", "train_"))}
        for entry in trainer.state.log_history
    ]
    return trainer.actor.state_dict(), log


def is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_sampler_equal_to_the_trainer_changes_no_bit(make: Any) -> None:
    expected, log = trained(make())
    found, entries = trained(make(engine()))
    assert is_same(expected, found)
    gaps = [{k: entry.pop(k) for k in list(entry) if k.startswith("sampler/")} for entry in entries]
    assert entries == log
    names = ("logprob_gap", "logprob_gap_max", "kl", "capped_fraction", "excluded_fraction")
    assert gaps[:2] == [dict.fromkeys([f"sampler/{name}" for name in names], 0.0)] * 2


def test_a_shifted_sampler_has_its_weights_and_metrics_by_hand(make: Any) -> None:
    trainer = make(engine(*OFF), num_rollouts=1)
    rollout = trainer.collect(0)
    ids, mask = rollout.responses.response_ids, rollout.mask
    even = (ids % 2 == 0) & mask
    weights = torch.where(mask, torch.where(even, 2.0, 0.5), 0.0)
    torch.testing.assert_close(rollout.importance_weights, weights)

    _, (entry, *_) = trained(make(engine(*OFF), num_rollouts=1))
    tokens, evens = int(mask.sum()), int(even.sum())
    share = evens / tokens
    assert 0 < share < 1
    ln2 = math.log(2)
    expected = {
        "sampler/logprob_gap": (1 + share) * ln2,
        "sampler/logprob_gap_max": 2 * ln2,
        "sampler/kl": share * (3 - 2 * ln2) + (1 - share) * (ln2 - 0.5),
        "sampler/capped_fraction": share,
        "sampler/excluded_fraction": 0.0,
        "loss/policy_avg": float(-(weights * rollout.advantages).sum() / tokens),
    }
    assert {name: entry[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert abs(float(-rollout.advantages.sum() / tokens) - expected["loss/policy_avg"]) > 1e-3


def test_without_a_cap_the_gap_is_logged_and_nothing_corrected(make: Any) -> None:
    expected, _ = trained(make())
    found, (entry, *_) = trained(make(engine(*OFF), importance_cap=None))
    assert is_same(expected, found)
    assert entry["sampler/logprob_gap_max"] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert entry["sampler/capped_fraction"] == 0.0


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.3}, {"min_response_tokens": 4}])
def test_the_trainer_truncates_as_the_sampler_does(make: Any, tiny_tokenizer: Any, options: Any) -> None:
    trainer = make(temperature=0.7, **options)
    trainer.generate = engine(ends=tuple(trainer.ends), **options)
    rollout = trainer.collect(0)
    assert rollout.sampler_log_ratio.abs().max() < 1e-5
    torch.testing.assert_close(rollout.importance_weights, rollout.mask.float())
    untruncated = (rollout.logprobs - rollout.responses.sampler_logprobs)[rollout.mask]
    assert untruncated.max() <= 1e-5
    assert untruncated.min() < -1e-4


def test_a_token_that_the_trainer_excludes_is_not_learned_from(make: Any) -> None:
    """The engine draws from all tokens, and the trainer's top-k would leave one."""
    every = engine()
    trainer = make(lambda *args, **options: every(*args, **options | {"top_k": 0}), top_k=1)
    rollout = trainer.collect(0)
    is_excluded = rollout.sampler_log_ratio.isinf()
    assert rollout.importance_weights[is_excluded].eq(0).all()
    (fraction,) = trainer.running_metrics["sampler/excluded_fraction"]
    assert fraction == pytest.approx(float(is_excluded.sum() / rollout.mask.sum()))
    assert fraction > 0.9
    assert math.isfinite(trainer.running_metrics["sampler/kl"][0])


def test_the_built_in_sampler_costs_no_truncated_log_probabilities(make: Any, monkeypatch: Any) -> None:
    asked = []
    monkeypatch.setattr(logprobs, "truncated_logprobs", lambda *args: asked.append(args))
    rollout = make(top_k=3, top_p=0.5).collect(0)
    assert (asked, rollout.sampler_log_ratio, rollout.importance_weights) == ([], None, None)


def test_the_corrected_gradient_does_not_depend_on_how_a_minibatch_is_cut(make: Any) -> None:
    sizes = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    cuts = [
        {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro} for micro in (4, 1)
    ]
    (one, log), (other, entries) = (trained(make(engine(*OFF), **sizes, **cut)) for cut in cuts)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-4)
    for entry, same in zip(log, entries, strict=True):
        assert {k: v for k, v in entry.items() if "sampler/" in k} == pytest.approx(
            {k: v for k, v in same.items() if "sampler/" in k}, abs=1e-5
        )


def test_an_interrupted_run_with_an_engine_ends_in_the_same_bits(make: Any, monkeypatch: Any) -> None:
    """The samples of this engine derive from seed and row, as the built-in sampler's do."""
    options = {"num_rollouts": 3, "save_strategy": "steps", "save_steps": 1}
    expected, log = trained(make(engine(*OFF), **options))
    killed = make(engine(*OFF), **options)
    collect = killed.collect
    monkeypatch.setattr(
        killed, "collect", lambda number: collect(number) if number < 2 else pytest.fail("killed")
    )
    with pytest.raises(pytest.fail.Exception):
        killed.train()
    resumed = make(engine(*OFF), **options)
    resumed.train(resume_from_checkpoint=True)
    assert is_same(expected, resumed.actor.state_dict())
    assert resumed.state.log_history[2]["sampler/kl"] == log[2]["sampler/kl"]


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (torch.zeros(4, 1), r"the shape \(4, 1\), expected \(4, \d\)"),
        (None, "above 0 or not finite; expected log-probabilities"),
    ],
)
def test_what_are_no_log_probabilities_is_refused(make: Any, logprobs: Any, message: str) -> None:
    def sample(*args: Any, **options: Any) -> Responses:
        found = engine()(*args, **options)
        found.sampler_logprobs = found.sampler_logprobs * math.nan if logprobs is None else logprobs
        return found

    with pytest.raises(UserError, match=message):
        make(sample).collect(0)


@pytest.mark.parametrize("cap", [0.5, 0.0])
def test_a_cap_below_one_is_refused(cap) -> None:
    with pytest.raises(ValueError, match=rf"importance_cap={cap}: expected 1 or more, or none"):
        PPOConfig("out", importance_cap=cap, report_to="none")
