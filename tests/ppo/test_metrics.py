"""What a run logs and keeps of its evaluations."""

import json
import math

import pytest
import torch

from tests.ppo.making import PROMPTS


def test_metrics_have_the_names_that_trls_ppo_had(make):
    trainer = make(num_ppo_epochs=2)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {
        "objective/kl",
        "objective/entropy",
        "objective/scores",
        "objective/rlhf_reward",
        "objective/non_score_reward",
        "objective/kl_coef",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/clipfrac_avg",
        "val/ratio",
        "val/ratio_var",
        "val/num_eos_tokens",
        "val/explained_variance",
        "response/tokens",
        "response/ended_fraction",
        "time/generate",
        "time/score",
        "time/train",
        "tokens_per_second",
    } <= entry.keys()
    assert entry["val/ratio"] == pytest.approx(1.0, abs=0.05)
    assert 0 < entry["policy/entropy_avg"] <= math.log(trainer.actor.policy.config.vocab_size)
    assert entry["objective/raw_scores"] == pytest.approx(entry["objective/scores"])


def test_the_penalty_shown_is_that_of_the_estimator(make, tiny_gpt2, tiny_tokenizer):
    trainer = make(kl_estimator="k3", kl_coef=1.0)
    with torch.no_grad():
        trainer.actor.policy.transformer.wte.weight.mul_(1.5)  # away from its reference
    found = trainer.collect(0)
    by_hand = (torch.exp(found.ref_logprobs - found.logprobs) - 1 - found.ref_logprobs + found.logprobs)[
        found.mask
    ].sum() / 4
    assert trainer.running_metrics["objective/non_score_reward"] == [pytest.approx(-by_hand.item(), rel=1e-4)]
    assert by_hand > 0.01


def test_the_best_evaluation_is_kept(make, tmp_path):
    values = iter([1.0, 5.0, 3.0])
    current = [next(values)]
    trainer = make(lambda prompts, **_: current * len(prompts))
    for step, value in enumerate((1.0, 5.0, 3.0)):
        current[0] = value
        trainer.state.global_step = step
        with torch.no_grad():
            trainer.actor.value_head.bias.fill_(value)
        assert trainer.evaluate()["eval_reward"] == value
    from safetensors.torch import load_file

    assert load_file(tmp_path / "work" / "best/critic/value_head.safetensors")["bias"].item() == 5.0
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (5.0, 1)


def test_an_evaluation_counts_for_no_rollouts_time(make, monkeypatch):
    from pipeline.ppo import trainer as module

    trainer, now = make(), [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    trainer.clock["since"] = 90.0
    answer = trainer.sample
    monkeypatch.setattr(trainer, "sample", lambda *a: (now.__setitem__(0, now[0] + 7), answer(*a))[1])
    trainer.evaluate()
    assert trainer.clock["since"] == 97.0


def test_samples_of_each_evaluation_are_kept(make, tmp_path):
    from pipeline.ppo.samples import read_samples

    trainer = make()
    for step in (0, 12):
        trainer.state.global_step = step
        trainer.evaluate()
    rows = list(map(json.loads, read_samples(tmp_path / "work").splitlines()))
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (0, 12) for prompt in PROMPTS["prompt"]
    ]
    assert rows[0].keys() >= {"answer", "reward", "kl", "response_tokens", "ended_fraction"}
