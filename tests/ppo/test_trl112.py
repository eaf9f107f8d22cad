"""Against TRL 1.12's PPO, the last there was (`make oracle`): one update on the same rollout ends in the same
weights, and each way in
which the two are known to differ is shown."""

import copy
import inspect
import random

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2ForSequenceClassification

from pipeline import PPOConfig, PPOTrainer
from pipeline.models.chat import pad_rows, prompt_ids
from pipeline.models.generation import Responses
from pipeline.models.loading import load_policy
from pipeline.ppo import functional

from .ranks import on_two_ranks
from .trl112 import update

pytest.importorskip("trl.experimental.ppo", reason="TRL 1.12: make oracle")
pytestmark = pytest.mark.oracle

LONGEST = 12
SAME = {"kl_coef": 0.3, "gamma": 0.97, "lam": 0.9, "vf_coef": 0.7, "temperature": 0.7, "num_ppo_epochs": 3}
SAME |= {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "learning_rate": 0.1,
    "per_device_train_batch_size": 8,
}


@pytest.fixture
def world(tiny_gpt2, tiny_tokenizer):
    """Policy, reference, value head and reward model, all different, and their tokenizer; the same at each
    call.
    """

    def make(pad_token=None):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.pad_token = pad_token or tokenizer.pad_token
        torch.manual_seed(0)
        policy = load_policy(str(tiny_gpt2), tokenizer)
        reference = copy.deepcopy(policy)
        for parameter in reference.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        size = {
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 128,
            "vocab_size": len(tokenizer),
            "num_labels": 1,
        }
        classifier = GPT2ForSequenceClassification(GPT2Config(**size, pad_token_id=tokenizer.pad_token_id))
        classifier.score.weight.data *= 50
        return policy, reference, torch.nn.Linear(32, 1), classifier, tokenizer

    return make


FULL = [LONGEST] * 8  # none ends
RAGGED = [3, 12, 5, 12, 8, 1, 12, 10]  # those below LONGEST end with an EOS


def rollout(tokenizer, lengths):
    """Prompts of several lengths, their ids, and an answer to each, of so many tokens."""
    rng, tokens = random.Random(0), [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    texts = [
        " ".join(["What", "is", "the", "capital", "of", "Italy", "then", "?"][: 1 + i])
        for i in range(len(lengths))
    ]
    ends = [[tokenizer.eos_token_id] if length < LONGEST else [] for length in lengths]
    answers = [rng.choices(tokens, k=n - len(end)) + end for n, end in zip(lengths, ends, strict=True)]
    return [(text, prompt_ids(tokenizer, text), answer) for text, answer in zip(texts, answers, strict=True)]


def theirs(monkeypatch, world, given, folder, batches=1, **settings):
    return update(
        monkeypatch, *world, [(ids, answer) for _, ids, answer in given], folder, batches, **settings
    )


def ours(world, given, folder, scores=None, **settings):
    """This project's trainer after the same update, and its experience; `scores` of each answer, or 0."""
    policy, reference, head, _, tokenizer = world
    answers, experience = {tuple(ids): answer for _, ids, answer in given}, []

    def generate(policy, tokenizer, prompts, *_, **__):
        drawn = [answers[tuple(prompt)] for prompt in prompts]
        query, response = (
            pad_rows(prompts, tokenizer.pad_token_id, side="left"),
            pad_rows(drawn, tokenizer.pad_token_id),
        )
        return Responses(
            *query, *response, ["" for _ in drawn], [ids[-1] == tokenizer.eos_token_id for ids in drawn]
        )

    def reward(completion_ids, **_):
        return [float(scores[tuple(ids)]) if scores else 0.0 for ids in completion_ids]

    plain = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
    }
    own = {
        "score_normalization": "none",
        "missing_eos_penalty": 0.0,
        "response_tokens": LONGEST,
        "num_rollouts": 1,
        "max_kl": None,
    }
    args = PPOConfig(str(folder), **plain | own | settings)
    data = Dataset.from_list([{"prompt": text} for text, *_ in given])
    trainer = PPOTrainer(policy, reward, args, data, tokenizer, generate=generate)
    trainer.actor.reference.load_state_dict(reference.state_dict())
    trainer.actor.value_head.load_state_dict(head.state_dict())
    collect = trainer.collect
    trainer.collect = lambda number: experience.append(collect(number)) or experience[-1]
    trainer.train()
    return trainer, experience[0]


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_an_update_ends_in_the_same_weights(estimator, world, tmp_path, monkeypatch):
    """Of answers that all fill their room, with whitening as TRL has it: the ways to differ are left out, and
    nothing else differs.
    """
    both = SAME | {"kl_estimator": estimator}
    first, second, start = world(), world(), world()
    given = rollout(first[-1], FULL)
    seen = theirs(monkeypatch, first, given, tmp_path, **both)
    count = len(given) * LONGEST
    monkeypatch.setattr(
        functional,
        "whiten",
        lambda x, mask, whiten=functional.whiten: whiten(x, mask) * ((count - 1) / count) ** 0.5,
    )
    scores = {answer: row["scores"] for answer, row in seen.rows.items()}
    trainer, experience = ours(second, given, tmp_path, scores, **both)

    for row, answer in enumerate(experience.responses.token_lists()):
        torch.testing.assert_close(
            experience.values[row], seen.rows[tuple(answer)]["values"], atol=1e-5, rtol=1e-4
        )
        expected = seen.rows[tuple(answer)]["advantages"] + seen.rows[tuple(answer)]["values"]
        torch.testing.assert_close(experience.returns[row], expected, atol=1e-5, rtol=1e-4)
    assert min(seen.logs["policy/clipfrac_avg"], seen.logs["val/clipfrac_avg"]) > 0.02
    for name in (
        "objective/scores",
        "objective/non_score_reward",
        "loss/policy_avg",
        "loss/value_avg",
        "policy/clipfrac_avg",
        "val/clipfrac_avg",
    ):
        assert seen.logs[name] == pytest.approx(trainer.state.log_history[0][name], rel=1e-4)
    for mine, peer, before in (
        (trainer.actor.policy, first[0], start[0]),
        (trainer.actor.value_head, first[2], start[2]),
    ):
        moved = dict(peer.named_parameters())
        for name, parameter in before.named_parameters():
            change = moved[name] - parameter
            torch.testing.assert_close(
                dict(mine.named_parameters())[name] - parameter,
                change,
                atol=1e-3 * float(change.abs().max()),
                rtol=0,
            )
            assert change.abs().max() > 0


def test_their_minibatches_add_no_optimizer_steps(world, tmp_path, monkeypatch):
    both = SAME | {"num_ppo_epochs": 1, "num_mini_batches": 2}
    first, second = world(), world()
    given = rollout(first[-1], FULL)
    seen = theirs(
        monkeypatch,
        first,
        given,
        tmp_path,
        2,
        **both | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    )
    trainer, _ = ours(second, given, tmp_path, **both | {"per_device_train_batch_size": 4})
    assert (len(seen.gradients), trainer.state.global_step) == (1, 2)


def test_their_gradient_is_not_clipped(world, tmp_path, monkeypatch):
    both = SAME | {"num_ppo_epochs": 1, "max_grad_norm": 0.01, "learning_rate": 1.0}
    first, second, start = world(), world(), world()
    given = rollout(first[-1], FULL)
    seen = theirs(monkeypatch, first, given, tmp_path, **both)
    trainer, _ = ours(second, given, tmp_path, **both)
    moved = [*trainer.actor.policy.parameters(), *trainer.actor.value_head.parameters()]
    before = [*start[0].parameters(), *start[2].parameters()]
    step = torch.stack([(after - at).norm() for after, at in zip(moved, before, strict=True)]).norm()
    assert seen.gradients[0] > 0.1
    assert float(step) == pytest.approx(0.01, rel=1e-2)


def test_their_score_lands_one_token_after_the_eos(world, tmp_path, monkeypatch):
    """With γ = λ = 1 and no KL penalty the rewards are the differences of the returns."""
    both = SAME | {"num_ppo_epochs": 1, "kl_coef": 0.0, "gamma": 1.0, "lam": 1.0}
    first, second = world(), world()
    given = rollout(first[-1], RAGGED)
    seen = theirs(monkeypatch, first, given, tmp_path, **both)
    _, experience = ours(
        second, given, tmp_path, {answer: row["scores"] for answer, row in seen.rows.items()}, **both
    )
    for row, answer in enumerate(map(tuple, experience.responses.token_lists())):
        after, score = torch.arange(LONGEST) > len(answer), float(seen.rows[answer]["scores"])
        their_values = torch.where(after, 0.0, seen.rows[answer]["values"])
        returns = torch.cat([seen.rows[answer]["advantages"] + their_values, torch.zeros(1)])
        rewards = returns[:-1] - returns[1:]
        assert rewards.abs().argmax() == min(len(answer), LONGEST - 1)
        assert float(rewards[min(len(answer), LONGEST - 1)]) == pytest.approx(score, abs=1e-4)
        expected = torch.where(experience.mask[row], score, 0.0)
        torch.testing.assert_close(experience.returns[row], expected, atol=1e-4, rtol=1e-4)


def test_their_eos_is_hidden_where_it_is_the_padding(world, tmp_path, monkeypatch):
    eos = world()[-1].eos_token
    first, second = world(eos), world(eos)
    given = rollout(first[-1], RAGGED)
    seen = theirs(monkeypatch, first, given, tmp_path, **SAME)
    _, experience = ours(second, given, tmp_path, **SAME)
    assert int(sum(row["mask"].sum() for row in seen.rows.values())) == sum(n - (n < LONGEST) for n in RAGGED)
    assert int(experience.mask.sum()) == sum(RAGGED)


def test_their_metrics_count_the_padding(world, tmp_path, monkeypatch):
    """The same answers in a batch twice as wide: the weights go the same way, and the KL to the old policy
    reads half.
    """
    name, figures = "policy/approxkl_avg", []
    given = rollout(world()[-1], [3, 5, 8, 1, 10, 2, 7, 4])
    for width in (LONGEST, 2 * LONGEST):
        with monkeypatch.context() as patch:
            seen = theirs(patch, world(), given, tmp_path, **SAME, response_length=width)
        trainer, _ = ours(world(), given, tmp_path, **SAME | {"response_tokens": width})
        figures.append((seen.logs[name], trainer.state.log_history[0][name]))
    (their_narrow, narrow), (their_wide, wide) = figures
    assert their_wide == pytest.approx(their_narrow / 2, rel=1e-3)
    assert wide == pytest.approx(narrow, rel=1e-4)


def test_their_gradient_depends_on_how_a_batch_is_cut(world, tmp_path, monkeypatch):
    """Each micro-batch has its own mean, however few its tokens are."""
    norms, steps = [], []
    given = rollout(world()[-1], RAGGED)
    for micro in (8, 2):
        both = SAME | {
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": 8 // micro,
        }
        with monkeypatch.context() as patch:
            norms.append(theirs(patch, world(), given, tmp_path, 2, **both).gradients)
        steps.append(ours(world(), given, tmp_path, **both)[0].state.log_history[0]["grad_norm"])
    (whole,), (cut,) = norms
    assert abs(cut / whole - 1) > 0.02
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)


def test_they_neither_evaluate_nor_resume_nor_keep_the_critic(world, tmp_path, monkeypatch):
    from trl.experimental.ppo import PPOTrainer as Theirs

    monkeypatch.setattr(Theirs, "evaluate", lambda *_, **__: pytest.fail("it evaluates"))
    first = world()
    seen = theirs(
        monkeypatch, first, rollout(first[-1], FULL), tmp_path, **SAME, eval_strategy="steps", eval_steps=1
    )
    assert list(inspect.signature(seen.trainer.train).parameters) == []
    seen.trainer.save_model(str(tmp_path / "saved"))
    kept = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert kept
    assert not any("score" in name or "value" in name for name in kept)


def test_their_reward_model_reads_the_policys_ids(world, tmp_path, monkeypatch):
    """One with another, smaller vocabulary fails at best. Here it is given texts:
    tests/reward/test_functions.py.
    """
    policy, reference, head, classifier, tokenizer = world()
    classifier.resize_token_embeddings(50)
    with pytest.raises(IndexError):
        theirs(
            monkeypatch,
            (policy, reference, head, classifier, tokenizer),
            rollout(tokenizer, FULL),
            tmp_path,
            **SAME,
        )


def test_they_whiten_on_each_rank_alone(tmp_path):
    halves = on_two_ranks("trl.experimental.ppo.ppo_trainer:masked_whiten", tmp_path)
    assert [half.mean().item() for half in halves] == pytest.approx([0, 0], abs=1e-5)
