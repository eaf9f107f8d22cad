"""What PPO can be told, one by one: each changes what it says it changes, and nothing else."""

import json
import math

import pytest
import torch
from datasets import Dataset

from pipeline.errors import UserError
from pipeline.models.chat import pad_rows, prompt_ids
from pipeline.models.ends import declared_ends
from pipeline.models.generation import Responses
from pipeline.models.loading import head_config, load_classifier, load_policy
from pipeline.ppo.callbacks import check_kl
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.functional import gae, whiten
from pipeline.ppo.trainer import PPOTrainer
from pipeline.reward.functions import RewardSource

PROMPTS = Dataset.from_list(
    [{"prompt": p} for p in ("Tell me the capital of Italy.", "Name the colour of snow.", "Hello.", "Why?")]
)
SHOWN = Dataset.from_list(
    [
        {"prompt": "Tell me the capital of Italy.", "completion": "Rome."},
        {"prompt": "Hello.", "completion": "Hi."},
    ]
)


def evenness(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def make(tiny_gpt2, tiny_tokenizer, tmp_path):
    def trainer(reward=evenness, policy=None, data=PROMPTS, **more):
        parts = {
            name: more.pop(name)
            for name in ("demonstrations", "generate", "max_prompt_tokens", "overlong")
            if name in more
        }
        settings = {
            "num_rollouts": 1,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": 4,
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
        policy = policy or load_policy(str(tiny_gpt2), tiny_tokenizer)
        return PPOTrainer(policy, reward, args, data, tiny_tokenizer, eval_dataset=data, **parts)

    return trainer


def weights(trainer):
    return {name: value.clone() for name, value in trainer.actor.state_dict().items()}


def changed(trainer):
    before = weights(trainer)
    trainer.train()
    return {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}


def scripted(*values):
    """A reward that gives these, rollout after rollout."""
    given = iter(values)
    return lambda prompts, **_: [next(given) for _ in prompts]


# Scores


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
            lambda prompts, **_: [None] * 4,
            "the reward of the response .* is None, a NoneType; expected a finite number",
        ),
        (
            lambda prompts: [0.0] * 4,
            "the reward cannot be called: .*; it is called with prompts, completions",
        ),
    ],
)
def test_a_reward_that_is_no_reward_is_named(make, reward, message):
    with pytest.raises(UserError, match=message):
        make(reward).train()


def test_running_normalisation_is_exact_far_from_zero(make):
    found = make(scripted(1000.0, 1000.01, 1000.0, 1000.01), score_normalization="running").collect(0)
    assert found.scores.tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0], rel=1e-3)


# The losses


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


# Credit inside a response


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


def test_values_move_freely_without_a_clip(make):
    """A reward of 100 pulls the values far from their start, 0, and 0.2 is soon too narrow a clip."""

    def clipped(**more):
        trainer = make(scripted(*[100.0] * 4), num_ppo_epochs=30, learning_rate=0.01, **more)
        trainer.train()
        return trainer.state.log_history[0]["val/clipfrac_avg"]

    assert clipped() > 0
    assert clipped(clip_value=None) == 0


# Rollouts


def test_the_live_policy_is_asked_by_one_small_interface(make):
    from pipeline.models import generation

    asked = []

    def generate(policy, tokenizer, prompts, noise, **drawing):
        asked.append((len(prompts), tuple(noise.shape), drawing))
        return generation.generate(policy, tokenizer, prompts, noise, **drawing)

    make(generate=generate, num_rollouts=2, top_k=7, stop_token=".", min_response_tokens=2).train()
    drawing = {
        "temperature": 1.0,
        "top_k": 7,
        "top_p": 1.0,
        "min_response_tokens": 2,
        "stop_token": ".",
        "batch_size": 64,
    }
    assert asked == [(4, (4, 6), drawing)] * 2


def test_a_published_policy_declares_its_stop_token(make, tiny_tokenizer, tmp_path):
    trainer = make(stop_token=".")
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    ends = [tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids(".")]
    assert declared_ends(str(tmp_path / "policy")) == ends


def test_prompts_that_are_too_long_are_dropped_or_cut_at_their_end(make, capsys):
    data = Dataset.from_list([{"prompt": "Hello."}, {"prompt": "Hello. " * 30}])
    trainer = make(data=data, max_prompt_tokens=8, overlong="drop")
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (1, 1)
    assert "ppo: prompts of train_dataset: over 8 tokens (overlong: drop): 1 of 2" in capsys.readouterr().out
    trainer = make(data=data, max_prompt_tokens=8, overlong="truncate_right")
    ids = prompt_ids(trainer.processing_class, data[1]["prompt"])[:8]
    responses = trainer.sample(data, [1], 0, [0])
    assert responses.query_ids[0].tolist() == ids


@pytest.mark.parametrize(
    "prompts",
    [["", "Hello."], ["<|eos|>", "Hello."], ["word " * 500, "Hello."]],
    ids=["empty", "only EOS", "long"],
)
def test_prompts_of_any_length_are_answered(make, prompts):
    trainer = make(data=Dataset.from_list([{"prompt": prompt} for prompt in prompts]), num_rollouts=2)
    trainer.train()
    widths = trainer.collect(0).responses.query_mask.sum(1)
    assert widths.min() >= 1
    assert widths.max() <= 128 - 6  # the policy's positions, less the answer


def test_an_answer_of_one_token_is_trained_on(make):
    trainer = make(response_tokens=1)
    assert trainer.collect(0).mask.sum(1).tolist() == [1] * 4
    assert "value_head.bias" in changed(trainer)


def test_no_room_for_a_prompt_is_an_error(make):
    with pytest.raises(
        UserError, match="response_tokens=128 leaves no room for a prompt in the policy's 128 positions"
    ):
        make(response_tokens=128)


# Guards


def test_a_gradient_that_is_not_finite_skips_its_step(make, capsys, tmp_path):
    trainer = make(num_rollouts=3, num_ppo_epochs=1)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (
        compute(*a, **k) * (math.nan if trainer.state.global_step == 1 else 1.0)
    )
    at = []
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: (at.append(weights(trainer)["value_head.weight"]), step(*a, **k))[
        1
    ]
    trainer.train()
    assert not torch.equal(at[0], at[1])
    assert torch.equal(at[1], at[2])
    assert not torch.equal(at[2], weights(trainer)["value_head.weight"])
    assert "step 1: the gradient is not finite" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "work" / "skipped-1.jsonl").open(encoding="utf-8")]
    assert [len(row["logprobs"]) for row in rows] == [len(row["response_ids"]) for row in rows]
    assert len(rows) == 4


def test_three_in_a_row_stop_the_run(make):
    trainer = make(num_rollouts=9)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: (
        compute(*a, **k) * (math.nan if trainer.state.global_step in (0, 2, 3, 4) else 1.0)
    )
    with pytest.raises(UserError, match="not finite in 3 steps in a row"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_a_policy_too_far_from_its_reference_stops_the_run(make):
    trainer = make(num_rollouts=9, learning_rate=0.3, max_kl=0.5)
    with pytest.raises(
        UserError,
        match=(
            r"KL to the reference is [\d.e+]+ nats per response, above training.max_kl=0.5; the "
            r"last checkpoints are kept"
        ),
    ):
        trainer.train()
    assert 0 < trainer.state.global_step < 9


@pytest.mark.parametrize("limit", [0.5, None])
@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_stops_the_run_without_a_limit_too(kl, limit):
    message = rf"ppo: rollout 3: KL to the reference is {kl}, not finite; .* in w;"
    with pytest.raises(UserError, match=message):
        check_kl(kl, limit, 3, "w")


# What is seen


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


def test_a_head_on_other_states_than_the_layers_own(make, tiny_tokenizer):
    """OPT-350m's output layer reads 512 numbers of 1,024; its positions begin at 2."""
    from transformers import OPTConfig, OPTForCausalLM

    size = {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
    }
    policy = OPTForCausalLM(
        OPTConfig(**size, vocab_size=len(tiny_tokenizer), max_position_embeddings=64, pad_token_id=0)
    )
    trainer = make(policy=policy, data=Dataset.from_list([{"prompt": "word " * 200}]))
    trainer.train()
    assert trainer.actor.value_head.in_features == 16
    assert int(trainer.collect(0).responses.query_mask.sum(1)[0]) == 64 - 6


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

    assert load_file(tmp_path / "work" / "best" / "value_head.safetensors")["bias"].item() == 5.0
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
