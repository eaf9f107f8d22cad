"""ppo: the trainer learns, is exact, resumes in the same bits, and publishes what it trained."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import PPOConfig, PPOTrainer, config
from pipeline.errors import UserError
from pipeline.models.loading import load_policy, load_tokenizer, merge_adapter
from pipeline.ppo import stage as ppo
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.rollout import split_minibatches
from pipeline.sft import stage as sft

PROMPTS = Dataset.from_list(
    [
        {"prompt": p}
        for p in (
            "Tell me the capital of Italy.",
            "Name the colour of snow.",
            "Hello.",
            "I forgot the young of a cat.",
        )
    ]
)
# Options that decide how credit is given inside a response, and a warm-up of the critic.
CREDIT = {
    "lam": 0.9,
    "lam_value": 1.0,
    "lam_length": 0.5,
    "clip_value": None,
    "critic_warmup_rollouts": 1,
    "critic_warmup_patience": 2,
}


def evenness(prompts, completions, completion_ids, ended, **_):
    """A reward any policy can learn, from any start: the fraction of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def evenness_by_token(completion_ids, **_):
    return [[(token % 2 == 0) / len(ids) for token in ids] for ids in completion_ids]


def trainer_of(policy, tokenizer, folder, reward=evenness, **more):
    settings = {
        "num_rollouts": 2,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "response_tokens": 8,
        "learning_rate": 1e-3,
        "score_normalization": "none",
        "missing_eos_penalty": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    args = PPOConfig(output_dir=str(folder), **settings | more)
    return PPOTrainer(policy, reward, args, PROMPTS, tokenizer, eval_dataset=PROMPTS)


@pytest.fixture
def policy(tiny_gpt2, tiny_tokenizer):
    return load_policy(str(tiny_gpt2), tiny_tokenizer)


def lora(policy):
    return get_peft_model(policy, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))


def test_a_reward_that_can_be_learned_is_learned(policy, tiny_tokenizer, tmp_path):
    more = {
        "num_rollouts": 30,
        "learning_rate": 5e-3,
        "kl_coef": 0.0,
        "per_device_train_batch_size": 8,
        "num_mini_batches": 1,
    }
    trainer = trainer_of(policy, tiny_tokenizer, tmp_path, **more)
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert before < 0.6
    assert trainer.evaluate()["eval_reward"] > 0.75


def test_the_first_minibatch_has_ratio_one_to_the_bit_or_the_run_stops(policy, tiny_tokenizer, tmp_path):
    trainer_of(policy, tiny_tokenizer, tmp_path).train()
    broken = trainer_of(policy, tiny_tokenizer, tmp_path)
    for module in broken.actor.policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    with pytest.raises(UserError, match="something in the model is random"):
        broken.train()


def test_rollout_k_starts_after_k_times_steps_per_rollout_steps(
    policy, tiny_tokenizer, tmp_path, monkeypatch
):
    trainer = trainer_of(policy, tiny_tokenizer, tmp_path, num_rollouts=3)
    started = []
    collect = trainer.collect
    monkeypatch.setattr(
        trainer,
        "collect",
        lambda rollout: (started.append((rollout, trainer.state.global_step)), collect(rollout))[1],
    )
    trainer.train()
    assert started == [(0, 0), (1, 4), (2, 8)]


def test_minibatches_partition_the_rollout(policy, tiny_tokenizer, tmp_path):
    trainer = trainer_of(policy, tiny_tokenizer, tmp_path)
    answers = trainer.collect(0).responses
    plans = [split_minibatches(answers, trainer.args, 0, epoch) for epoch in range(2)]
    for each in plans:
        assert [[len(rows) for rows in minibatch] for minibatch in each] == [[2, 2], [2, 2]]
        assert sorted(row for minibatch in each for rows in minibatch for row in rows) == list(range(8))
    assert plans[0] != plans[1]


@pytest.mark.parametrize("more", [{}, CREDIT], ids=["plain", "credit"])
def test_the_gradient_does_not_depend_on_how_a_minibatch_is_cut(more, tiny_gpt2, tiny_tokenizer, tmp_path):
    weights = []
    for micro, parts in ((8, 1), (2, 4)):
        policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
        cut = {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": parts,
            "num_mini_batches": 1,
            "num_ppo_epochs": 1,
        }
        trainer = trainer_of(
            policy,
            tiny_tokenizer,
            tmp_path,
            num_rollouts=2 if more else 1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            **cut,
            **more,
        )
        trainer.train()
        weights.append(trainer.actor.state_dict())
    moved = load_policy(str(tiny_gpt2), tiny_tokenizer).transformer.h[0].mlp.c_fc.weight
    assert not torch.equal(weights[0]["policy.transformer.h.0.mlp.c_fc.weight"], moved)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("adapt", "more"),
    [(lambda policy: policy, {}), (lora, {}), (lora, CREDIT | {"critic_warmup_rollouts": 3})],
    ids=["full", "lora", "in the warm-up"],
)
def test_an_interrupted_run_ends_in_the_same_bits(
    adapt, more, tiny_gpt2, tiny_tokenizer, tmp_path, monkeypatch
):
    def make(folder):
        torch.manual_seed(0)
        policy = adapt(load_policy(str(tiny_gpt2), tiny_tokenizer))
        saved = {"num_rollouts": 4, "save_strategy": "steps", "save_steps": 4, "kl_target": 0.1}
        saved |= {"score_normalization": "running"} | more
        return trainer_of(policy, tiny_tokenizer, folder, evenness_by_token, **saved)

    alone = make(tmp_path / "alone")
    alone.train()
    killed = make(tmp_path / "killed")
    collect = killed.collect
    monkeypatch.setattr(
        killed, "collect", lambda rollout: collect(rollout) if rollout < 2 else pytest.fail("killed")
    )
    with pytest.raises(pytest.fail.Exception):
        killed.train()
    resumed = make(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    expected, found = alone.actor.state_dict(), resumed.actor.state_dict()
    assert expected.keys() == found.keys() >= {"kl_coef", "value_head.weight"}
    assert float(expected["kl_coef"]) != 0.05
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for name, state in alone.optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(state[key], resumed.optimizer.state_dict()["state"][name][key]) for key in state
        )


@pytest.mark.parametrize("adapt", [lambda policy: policy, lora], ids=["full", "lora"])
def test_in_bf16_the_reference_and_the_sampling_are_computed_as_the_policy_is(
    adapt, policy, tiny_tokenizer, tmp_path
):
    trainer = trainer_of(
        adapt(policy), tiny_tokenizer, tmp_path, bf16=True, learning_rate=0.0, num_rollouts=1
    )
    in_bf16: list[bool] = []
    for model in filter(None, (trainer.actor.policy, trainer.actor.reference)):
        model.register_forward_pre_hook(lambda *_: in_bf16.append(torch.is_autocast_enabled("cpu")))
    trainer.train()  # its ratio is 1 to the bit, or it stops
    kl = trainer.evaluate()["eval_kl"]
    assert len(in_bf16) > 10
    assert all(in_bf16)
    assert adapt is lora or kl == 0.0  # nothing was learned: the policy is its reference


@pytest.mark.parametrize("named", [False, True], ids=["base", "adapter"])
def test_under_lora_the_reference_is_the_same_backbone(named, policy, tiny_tokenizer):
    model = lora(policy)
    if named:
        model.add_adapter("reference", LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    actor = ActorCritic(model, 0.1)
    inputs = {
        "query_ids": torch.tensor([[5, 6]]),
        "query_mask": torch.ones(1, 2, dtype=torch.long),
        "response_ids": torch.tensor([[7, 8]]),
        "response_mask": torch.ones(1, 2, dtype=torch.long),
    }
    trained = [name for name, p in actor.named_parameters() if p.requires_grad]
    with torch.no_grad():
        first = actor(**inputs, temperature=1.0).logprobs
        reference = actor.reference_logprobs(**inputs, temperature=1.0)
        assert torch.equal(actor(**inputs, temperature=1.0).logprobs, first)
    assert not torch.allclose(reference, first)
    assert [name for name, p in actor.named_parameters() if p.requires_grad] == trained
    with torch.no_grad(), model.disable_adapter():
        bare = actor(**inputs, temperature=1.0).logprobs
    assert torch.equal(bare, reference) != named


@pytest.mark.parametrize("form", ["full", "lora on a full policy", "lora on an adapter"])
def test_the_stage_publishes_policy_and_critic(form, tiny_records, tiny_gpt2, tmp_path):
    common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_records)}
    policy = str(tiny_gpt2)
    if form == "lora on an adapter":
        policy = str(
            sft.run(
                config.SFTStage(
                    model=policy, max_length=96, lora={"r": 4}, training={"max_steps": 2}, **common
                )
            )
        )
    training = {
        "num_rollouts": 2,
        "num_ppo_epochs": 1,
        "per_device_train_batch_size": 4,
        "response_tokens": 6,
        "learning_rate": 1e-2,
    }
    stage = config.PPOStage(
        policy=policy,
        reward="pipeline.prepare.demo:gold_reward",
        training=training,
        lora={} if form != "full" else None,
        **common,
    )
    folder = ppo.run(stage)
    assert load_file(folder / "critic/value_head.safetensors").keys() == {"weight", "bias"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (
        (folder / "adapter_config.json").exists()
        == (form != "full")
        == (not isinstance(model, PeftModel) and hasattr(model, "peft_config"))
    )
    entries = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    assert {
        "objective/kl",
        "objective/scores",
        "policy/clipfrac_avg",
        "val/explained_variance",
        "response/tokens",
    } <= entries[0].keys()
    assert abs(entries[0]["objective/kl"]) < 1e-4  # the policy starts at its reference


def test_merged_it_is_the_policy_that_its_adapter_makes(tiny_records, tiny_llama, tmp_path):
    common = {
        "run": "t",
        "runs": str(tmp_path),
        "records": str(tiny_records),
        "lora": {"r": 4},
        "merge": True,
    }
    policy = sft.run(
        config.SFTStage(
            model=str(tiny_llama), max_length=96, training={"max_steps": 2, "learning_rate": 1e-2}, **common
        )
    )
    training = {
        "num_rollouts": 1,
        "num_ppo_epochs": 1,
        "per_device_train_batch_size": 4,
        "response_tokens": 6,
        "learning_rate": 1e-1,
    }
    tuned = ppo.run(
        config.PPOStage(
            policy=str(policy), reward="pipeline.prepare.demo:gold_reward", training=training, **common
        )
    )
    ids, tokenizer = torch.tensor([[5, 6, 7, 8]]), load_tokenizer(str(tuned))
    logits = []
    for folder in (tiny_llama, policy, tuned, tuned / "best"):
        merged = AutoModelForCausalLM.from_pretrained(folder)
        assert not hasattr(merged, "peft_config")
        logits.append(merged(ids).logits)
        if folder != tiny_llama:
            by_adapter = load_policy(str(folder / "adapter"), tokenizer)
            torch.testing.assert_close(logits[-1], by_adapter(ids).logits, atol=1e-5, rtol=1e-4)
    assert (logits[1] - logits[0]).abs().max() > 1e-3
    assert (logits[2] - logits[1]).abs().max() > 1e-3


def test_what_is_added_to_a_tied_output_is_not_the_inputs(tiny_gpt2, tiny_tokenizer, tmp_path):
    lora = LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["lm_head", "c_attn"], init_lora_weights=False
    )
    adapted = get_peft_model(load_policy(str(tiny_gpt2), tiny_tokenizer), lora).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    merge_adapter(tmp_path, tiny_tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_policy_without_lora_is_refused(tiny_records, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "adapter_config.json").write_text("{}")
    stage = config.PPOStage(
        run="t",
        runs=str(tmp_path),
        policy=str(tmp_path / "policy"),
        reward="math:sqrt",
        records=str(tiny_records),
    )
    with pytest.raises(UserError, match="set lora"):
        ppo.load_trained_policy(stage, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kl_estimator": "k4"}, "k1, k2, k3"),
        ({"num_rollouts": 0}, "expected more than 0"),
        ({"score_normalization": "x"}, "none, reference"),
    ],
)
def test_impossible_settings_are_refused(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PPOConfig(output_dir=str(tmp_path), **wrong)


def test_an_epoch_is_a_rollout(tmp_path):
    epochs = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "eval_steps": 8,
    }
    args = PPOConfig(output_dir=str(tmp_path), num_ppo_epochs=4, num_mini_batches=2, **epochs)
    assert {args.save_strategy.value, args.eval_strategy.value, args.logging_strategy.value} == {"steps"}
    assert (args.save_steps, args.eval_steps, args.logging_steps) == (8, 8, 8)


def test_checkpoints_fall_between_rollouts(tmp_path):
    args = PPOConfig(
        output_dir=str(tmp_path),
        num_ppo_epochs=4,
        num_mini_batches=2,
        save_steps=10,
        eval_steps=8,
        logging_steps=1,
    )
    assert (args.steps_per_rollout, args.save_steps, args.eval_steps, args.logging_steps) == (8, 16, 8, 8)
    assert (
        PPOConfig(output_dir=str(tmp_path), num_rollouts=50, num_ppo_epochs=4).save_steps == 20
    )  # a tenth of the run
