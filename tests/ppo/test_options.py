"""What PPO can be told, one by one: each changes what it says it changes, and nothing else."""

import math

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.loading import head_config, load_classifier
from pipeline.ppo.config import PPOConfig
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import RewardSource
from pipeline.reward.token_rewards import StepRewards, place_rewards
from tests.ppo.making import PROMPTS, SHOWN, changed, scripted, weights


def test_scores_are_normalised_clipped_and_then_penalised(make):
    source = RewardSource(scripted(1.0, 5.0, 3.0, -1.0), mean=1.0, std=2.0)
    trainer = make(source, score_normalization="reference", score_clip=1.0, missing_eos_penalty=0.25)
    found = trainer.collect(0)
    expected = [
        score - 0.25 * (not ended)
        for score, ended in zip([0.0, 1.0, 1.0, -1.0], found.responses.ended, strict=True)
    ]
    assert found.scores.tolist() == expected
    assert not all(found.responses.ended)


def test_running_normalisation_is_by_all_scores_so_far(make):
    trainer = make(scripted(1.0, 3.0, 1.0, 3.0, 6.0, 6.0, 6.0, 6.0), score_normalization="running")
    assert trainer.collect(0).scores.tolist() == [-1.0, 1.0, -1.0, 1.0]  # mean 2, deviation 1
    assert trainer.actor.score_sums.tolist() == [4, 8, 20]
    # of all eight: mean 4, squares (20 + 144) / 8 − 16 = 4.5
    assert trainer.collect(1).scores.tolist() == pytest.approx([2 / 4.5**0.5] * 4)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda prompts, **_: [1.0, math.nan, 0.0, 0.0],
            r"the reward of the response .* is nan; expected a finite number",
        ),
        (lambda prompts, **_: [1.0], "the reward returned 1 scores for 4 responses"),
        (
            lambda prompts: [0.0] * 4,
            "the reward cannot be called: .*; it is called with prompts, completions",
        ),
    ],
)
def test_a_reward_that_is_no_reward_is_named(make, reward, message):
    with pytest.raises(UserError, match=message):
        make(reward).train()


def test_rewards_inside_a_response_shape_its_returns(make):
    """With γ = λ = 1 and no KL penalty, the returns are what is still to come."""

    def by_step(completions, completion_ids, **_):
        halves = [(len(text) // 2, len(text)) for text in completions]
        return [
            [1.0] * len(completion_ids[0]),
            0.5,
            StepRewards([2.0, -1.0], halves[2]),
            StepRewards([0.25, 0.5], halves[3]),
        ]

    trainer = make(by_step, kl_coef=0.0, gamma=1.0, lam=1.0)
    rollout = trainer.collect(0)
    ids, texts = rollout.responses.token_lists(), rollout.responses.texts
    expected = [[1.0] * len(ids[0]), [0.0] * (len(ids[1]) - 1) + [0.5]]
    for row, rewards in ((2, [2.0, -1.0]), (3, [0.25, 0.5])):
        ends = [len(texts[row]) // 2, len(texts[row])]
        expected.append(place_rewards(trainer.processing_class, ids[row], texts[row], ends, rewards))
        assert sum(reward != 0 for reward in expected[-1]) == 2
    for row, rewards in enumerate(expected):
        to_come = [sum(rewards[token:]) for token in range(len(rewards))]
        assert rollout.token_scores[row, : len(rewards)].tolist() == rewards
        assert rollout.returns[row, : len(rewards)].tolist() == pytest.approx(to_come, abs=1e-5)
    assert rollout.raw_scores == pytest.approx(list(map(sum, expected)))
    assert rollout.scores.tolist() == pytest.approx(rollout.raw_scores)


def test_their_metrics_are_those_of_the_sums(make):
    def per_token(completion_ids, **_):
        return [[token % 2 / len(ids) for token in ids] for ids in completion_ids]

    logs = []
    for reward in (per_token, lambda **batch: list(map(math.fsum, per_token(**batch)))):
        trainer = make(reward, kl_coef=0.0)
        trainer.collect(0)
        evaluated = trainer.evaluate()
        metrics = trainer.running_metrics
        logs.append(
            [metrics[f"objective/{name}"][0] for name in ("scores", "raw_scores", "rlhf_reward")]
            + [evaluated["eval_reward"]]
        )
    assert logs[0] == pytest.approx(logs[1])


def test_running_normalisation_is_exact_far_from_zero(make):
    found = make(scripted(1000.0, 1000.01, 1000.0, 1000.01), score_normalization="running").collect(0)
    assert found.scores.tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "coef", "lines"), [("k1", 0.1, 0), ("k2", 0.1, 1), ("k3", 0.1, 1), ("k3", 0.0, 0)]
)
def test_a_penalty_with_a_biased_gradient_is_warned_of(kind, coef, lines, make, capsys):
    make(kl_estimator=kind, kl_coef=coef)
    assert capsys.readouterr().out.count(f"kl_estimator: {kind} is a biased penalty") == lines


def test_while_the_critic_warms_up_nothing_else_learns(make):
    assert changed(make(critic_warmup_rollouts=1, weight_decay=0.1)) == {
        "value_head.weight",
        "value_head.bias",
    }
    assert len(changed(make(critic_warmup_rollouts=1, num_rollouts=2))) > 5


def test_a_warm_up_ends_with_its_rollout(make):
    trainer = make(critic_warmup_rollouts=1, num_rollouts=2, num_ppo_epochs=2, logging_steps=2)
    trainer.train()
    losses = [
        entry["policy/approxkl_avg"] for entry in trainer.state.log_history if "policy/approxkl_avg" in entry
    ]
    assert losses[0] == 0.0 < losses[1]


def test_the_value_head_can_start_as_the_reward_models(make, tiny_gpt2, tiny_tokenizer):
    from pipeline.reward.encoding import Encoding
    from pipeline.reward.functions import reward_from_model
    from pipeline.reward.model import RewardModel
    from pipeline.reward.settings import RewardSettings

    classifier = load_classifier(str(tiny_gpt2), tiny_tokenizer, head=head_config(["reward"], "regression"))
    settings = RewardSettings(
        encoding=Encoding("chat", eos=True, max_length=64), alpha=2.0, reward_mean=3.0, reward_std=4.0
    )
    source = reward_from_model(RewardModel(classifier, tiny_tokenizer, settings))
    head = make(source, value_init="reward", score_normalization="reference").actor.value_head
    torch.testing.assert_close(
        head.weight, 2.0 * classifier.score.weight / 8.0
    )  # alpha scales mean and deviation too
    assert head.bias.item() == -6.0 / 8.0
    with pytest.raises(
        UserError,
        match="value_init: reward needs one reward model with a scalar head on states of 32 numbers",
    ):
        make(value_init="reward")


def test_demonstrations_are_learned_from(make):
    """With PPO's own losses at nothing only they move the policy, towards what they show."""
    trainer = make(
        lambda prompts, **_: [0.0] * len(prompts),
        demonstrations=SHOWN,
        ptx_coef=1.0,
        kl_coef=0.0,
        num_rollouts=20,
        vf_coef=0.0,
        learning_rate=3e-3,
    )
    trainer.train()
    losses = [entry["loss/ptx_avg"] for entry in trainer.state.log_history if "loss/ptx_avg" in entry]
    assert losses[0] == pytest.approx(math.log(trainer.actor.policy.config.vocab_size), abs=0.5)
    assert losses[-1] < losses[0] - 1
    with pytest.raises(UserError, match=r"ptx_coef=0\.5 needs demonstrations"):
        make(ptx_coef=0.5)


def test_the_loss_of_demonstrations_does_not_depend_on_how_a_minibatch_is_cut(make):
    found = []
    for micro, parts in ((4, 1), (1, 4)):
        cut = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": parts,
            "optim": "sgd",
            "learning_rate": 0.1,
        }
        trainer = make(demonstrations=SHOWN, ptx_coef=1.0, max_grad_norm=0.0, **cut)
        trainer.train()
        found.append(weights(trainer))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-4)


def test_past_target_kl_the_rest_of_a_rollout_is_left_out(make):
    def steps(**more):
        trainer = make(num_ppo_epochs=3, learning_rate=1e-2, num_rollouts=2, **more)
        taken, step = [], type(trainer.optimizer) if trainer.optimizer else None
        assert step is None
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: (taken.append(trainer.state.global_step), compute(*a, **k))[1]
        trainer.train()
        return taken, trainer

    assert steps()[0] == [0, 1, 2, 3, 4, 5]
    taken, trainer = steps(target_kl=1e-9)
    assert taken == [0, 1, 3, 4]  # the first minibatch has moved nothing; the second shows that it did
    assert trainer.state.global_step == 6


def test_what_is_left_out_changes_no_weight(make):
    trainer = make(num_ppo_epochs=3, learning_rate=1e-2, target_kl=1e-9)
    seen = []
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: (
        seen.append(weights(trainer)["value_head.weight"]),
        step(*a, **k),
    )[1]
    trainer.train()
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], weights(trainer)["value_head.weight"])


def test_the_clips_are_handed_on_to_the_loss(make, monkeypatch):
    from pipeline.ppo import functional

    seen, original = set(), functional.policy_loss
    monkeypatch.setattr(functional, "policy_loss", lambda *a, **k: (seen.add(a[4:]), original(*a, **k))[1])
    make(clip_low=0.1, clip_high=0.3, dual_clip=2.0).train()
    assert seen == {(0.1, 0.3, 2.0)}


def test_values_move_freely_without_a_clip(make):
    """A reward of 100 pulls the values far from their start, 0, and 0.2 is soon too narrow a clip."""

    def clipped(**more):
        trainer = make(scripted(*[100.0] * 4), num_ppo_epochs=30, learning_rate=0.01, **more)
        trainer.train()
        return trainer.state.log_history[0]["val/clipfrac_avg"]

    assert clipped() > 0
    assert clipped(clip_value=None) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_p": 0.0}, "top_p=0.0: expected a number above 0"),
        ({"dual_clip": 1.0}, "dual_clip=1.0: expected more than 1, or none"),
        (
            {"min_response_tokens": 9, "response_tokens": 8},
            "min_response_tokens=9: expected at most response_tokens",
        ),
        ({"score_clip": 0.0}, "score_clip=0.0: expected more than 0, or none"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0: expected 0 or more"),
        ({"gamma": 1.5}, "gamma=1.5: expected a number from 0 to 1"),
        ({"max_steps": 5}, "max_steps=5 is not for PPO; set instead: num_rollouts"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True is not for PPO"),
        ({"save_strategy": "best"}, "save_strategy='best' is not for PPO"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: expected more than 0"),
        (
            {"kl_target": 1.0, "kl_horizon": 10, "per_device_train_batch_size": 64},
            "expected more than a fifth of the 64 responses",
        ),
        ({"lam_value": 1.1}, "lam_value=1.1: expected a number from 0 to 1, or none"),
        ({"lam_length": 0.0}, "lam_length=0.0: expected more than 0, or none"),
        ({"clip_value": -0.1}, "clip_value=-0.1: expected 0 or more, or none"),
        ({"critic_warmup_patience": 0}, "critic_warmup_patience=0: expected more than 0, or none"),
        (
            {"critic_warmup_patience": 1},
            "critic_warmup_rollouts=0: expected more than 0, with critic_warmup_patience",
        ),
        (
            {"critic_warmup_patience": 1, "critic_warmup_rollouts": 5, "vf_coef": 0.0},
            "vf_coef=0.0: expected more than 0, with critic_warmup_patience",
        ),
        ({"value_init": "one"}, "value_init='one': expected one of zero, reward"),
    ],
)
def test_impossible_settings_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PPOConfig(output_dir=str(tmp_path), **wrong)


def test_what_a_reward_logs_is_in_the_log_as_the_mean_over_rollouts(make):
    steps = []

    def reward(completion_ids, trainer_state, log_metric, log_extra, **columns):
        steps.append(trainer_state.global_step)
        log_metric("mine/rate", float(len(steps)))
        log_metric("loss", 1e6)  # a name that is taken
        log_extra("column", ["x"] * len(completion_ids))
        return [0.0] * len(completion_ids)

    trainer = make(reward, num_rollouts=4, logging_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "mine/rate" in entry]
    assert steps == [0, 1, 2, 3]
    assert [entry["mine/rate"] for entry in logs] == [1.5, 3.5]
    assert all(abs(entry["loss"]) < 100 for entry in logs)


def test_what_a_reward_logs_in_an_evaluation_is_a_metric_of_it(make):
    """Three responses in batches of two and one: each response counts once."""

    def reward(completion_ids, log_metric, **columns):
        log_metric("mine/rows", float(len(completion_ids)))
        log_metric("reward", 1e6)  # a name that is taken
        return [0.5] * len(completion_ids)

    trainer = make(reward, data=PROMPTS.select(range(3)), per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    assert metrics["eval_mine/rows"] == pytest.approx((2 + 2 + 1) / 3)
    assert metrics["eval_reward"] == 0.5
    assert trainer.state.log_history[-1]["eval_mine/rows"] == metrics["eval_mine/rows"]
    assert trainer.function_metrics == {}


def test_each_of_several_rewards_is_in_the_log_by_its_name(make):
    def lengths(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    def constant(completions, **columns):
        return [2.0] * len(completions)

    sources = [RewardSource(lengths, name="lengths"), RewardSource(constant, name="constant")]
    trainer = make(combine_rewards(sources, weights=[1.0, 10.0]), num_rollouts=2, logging_steps=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rewards/lengths" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["rewards/constant"] == 2.0
        assert entry["rewards/lengths"] == pytest.approx(entry["response/tokens"])
        assert entry["objective/raw_scores"] == pytest.approx(entry["rewards/lengths"] + 20.0)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/lengths"] == pytest.approx(metrics["eval_response_tokens"])
