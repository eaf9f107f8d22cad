"""A critic of its own: what it computes and learns, where it starts, and what is written of it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModel, AutoModelForCausalLM

from pipeline import Critic, PPOConfig, PPOTrainer
from pipeline.artifacts.schema import CRITIC
from pipeline.errors import UserError
from pipeline.models.loading import load_policy
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.arguments import check_launch
from pipeline.ppo.critic import split_learning_rate

LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TEMPERATURE = 0.7


def lora_policy(folder, **more):
    """A policy whose adapter is not zero."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(base, LoraConfig(**LORA | {"init_lora_weights": False} | more)).double()


def actor_on(on, folder, **more):
    policy = lora_policy(folder, **more)
    model = AutoModelForCausalLM.from_pretrained(folder).double() if on == "model" else None
    actor = ActorCritic(policy, 0.1, Critic(on, model=model)).double().train()
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if name in actor.critic_names():
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return actor


def batch():
    """Two rows of different lengths, padded as rollouts are."""
    generator = torch.Generator().manual_seed(3)
    query, response = (torch.randint(5, 200, (2, width), generator=generator) for width in (6, 4))
    query_mask, response_mask = torch.ones_like(query), torch.ones_like(response)
    query_mask[0, :2], response_mask[1, 3:] = 0, 0
    return query, query_mask, response, response_mask


def gradients(module):
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def rows():
    for ids, mask, answer, real in zip(*batch(), strict=True):
        yield ids[mask.bool()], answer[real.bool()]


def expected_gradients(actor):
    """The gradients of two copies of the model, each with one adapter, row by row and without padding.

    The loss is the sum of all log-probabilities and twice that of all values.
    """
    policy, head = copy.deepcopy(actor.policy), copy.deepcopy(actor.value_head)
    if actor.critic is None:
        critic = copy.deepcopy(actor.policy)
        policy.delete_adapter(CRITIC)
        critic.delete_adapter("default")
        critic.set_adapter(CRITIC)
        trunk = critic.get_base_model().model
    else:
        critic = trunk = copy.deepcopy(actor.critic)

    loss = 0.0
    for query, answer in rows():
        ids = torch.cat([query, answer])[None]
        last = slice(len(query) - 1, -1)
        logits = policy(ids).logits[0, last] / TEMPERATURE
        loss = loss + logits.log_softmax(-1)[range(len(answer)), answer].sum()
        loss = loss + 2 * head(trunk(ids).last_hidden_state[0, last]).sum()
    loss.backward()
    prefix = "policy." if actor.critic is None else "critic."
    found = {f"policy.{name}": value for name, value in gradients(policy).items()}
    found |= {f"{prefix}{name}": value for name, value in gradients(critic).items()}
    return found | {f"value_head.{name}": value for name, value in gradients(head).items()}


def found_gradients(actor):
    out = actor(*batch(), TEMPERATURE)
    (out.logprobs.sum() + 2 * out.values.sum()).backward()
    return gradients(actor)


def largest_error(found, expected):
    """As a share of the largest gradient."""
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - value).abs().max()) for name, value in expected.items()) / scale


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("on", "dora"), [("adapter", False), ("adapter", True), ("model", False)])
def test_gradients_are_those_of_separate_copies(on, dora, checkpointing, tiny_llama):
    actor = actor_on(on, tiny_llama, use_dora=dora)
    expected = expected_gradients(actor)
    if checkpointing:
        actor.gradient_checkpointing_enable()
    assert expected.keys() == {name for name, value in actor.named_parameters() if value.requires_grad}
    assert largest_error(found_gradients(actor), expected) < 1e-9
    assert actor.policy.active_adapter == "default"


@pytest.mark.parametrize("reentrant", [False, True])
def test_without_its_contexts_checkpointing_gets_them_wrong(reentrant, tiny_llama):
    """The trap: a layer is computed again with the adapter that is active in the backward."""
    actor = actor_on("adapter", tiny_llama)
    expected = expected_gradients(actor)
    actor.policy.enable_input_require_grads()
    actor.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = {name: torch.zeros_like(value) for name, value in expected.items()} | found_gradients(actor)
    assert largest_error(found, expected) > 0.1


def test_reentrant_checkpointing_is_refused_with_an_adapter_and_right_with_a_model(tiny_llama):
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(UserError, match="use_reentrant: true computes a layer again with whichever adapter"):
        actor_on("adapter", tiny_llama).gradient_checkpointing_enable(**options)
    actor = actor_on("model", tiny_llama)
    expected = expected_gradients(actor)
    actor.gradient_checkpointing_enable(**options)
    assert largest_error(found_gradients(actor), expected) < 1e-9


def test_a_second_backward_repeats_the_gradients(tiny_llama):
    actor = actor_on("adapter", tiny_llama)
    expected = expected_gradients(actor)
    actor.gradient_checkpointing_enable()
    out = actor(*batch(), TEMPERATURE)
    loss = out.logprobs.sum() + 2 * out.values.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    doubled = {name: 2 * value for name, value in expected.items()}
    assert largest_error(gradients(actor), doubled) < 1e-9


@pytest.mark.parametrize("on", ["adapter", "model"])
def test_values_send_no_gradient_to_the_policy(on, tiny_llama):
    actor = actor_on(on, tiny_llama)
    actor(*batch(), TEMPERATURE, critic_only=True).values.sum().backward()
    assert gradients(actor).keys() == actor.critic_names()
    assert len(actor.critic_names()) > 20


PROMPTS = Dataset.from_list(
    [{"prompt": text} for text in ("Name a colour.", "Hello.", "Why is that?", "Go.")]
)


def evenness(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def trainer_on(tiny_llama, tiny_tokenizer, tmp_path):
    """Returns a function of (on, learning rate of the critic, settings): a trainer with such a critic."""

    def make(on, critic_rate=None, name="work", quantization="none", critic=None, **more):
        settings = {
            "num_rollouts": 2,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
            "per_device_train_batch_size": 4,
            "response_tokens": 6,
            "learning_rate": 1e-3,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        args = PPOConfig(output_dir=str(tmp_path / name), **settings | more)
        torch.manual_seed(0)
        policy = load_policy(str(tiny_llama), tiny_tokenizer, quantization=quantization)
        if on == "adapter" or quantization != "none":
            policy = get_peft_model(policy, LoraConfig(**LORA, lora_dropout=0.5))
        model = load_policy(str(tiny_llama), tiny_tokenizer) if on == "model" else None
        critic = critic or Critic(on, model=model, learning_rate=critic_rate)
        return PPOTrainer(policy, evenness, args, PROMPTS, tiny_tokenizer, critic=critic)

    return make


def state(trainer):
    return {name: value.clone() for name, value in trainer.actor.state_dict().items()}


KINDS = ["trunk", "adapter", "model"]


@pytest.mark.parametrize("on", KINDS)
def test_in_the_warm_up_the_critic_alone_learns(on, trainer_on):
    trainer = trainer_on(on, critic_warmup_rollouts=2, num_rollouts=2, weight_decay=0.1)
    before = state(trainer)
    trainer.train()  # its ratio is 1 to the bit, or it stops
    changed = {name for name, value in state(trainer).items() if not torch.equal(value, before[name])}
    own = trainer.actor.critic_names()
    assert changed <= own
    assert {"value_head.weight", "value_head.bias"} <= changed
    assert len(changed) == 2 if on == "trunk" else len(changed) > 10
    assert own <= before.keys()  # all of the critic is in a checkpoint


@pytest.mark.parametrize("on", KINDS)
def test_its_learning_rate_is_its_own_and_follows_the_schedule(on, trainer_on):
    trainer = trainer_on(on, 4e-3, lr_scheduler_type="linear", num_rollouts=4)
    names = {id(parameter): name for name, parameter in trainer.actor.named_parameters()}
    rates = []
    step = trainer.training_step

    def record(*args, **kwargs):
        rates.append(
            {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        )
        return step(*args, **kwargs)

    trainer.training_step = record
    trainer.train()
    trained = {name for name, parameter in trainer.actor.named_parameters() if parameter.requires_grad}
    for number, found in enumerate(rates):
        assert found.keys() == trained
        share = 1 - number / 4
        for name, rate in found.items():
            expected = 4e-3 if name in trainer.actor.critic_names() else 1e-3
            assert rate == pytest.approx(expected * share)


def test_with_the_learning_rate_of_all_the_bits_are_those_without_groups(trainer_on):
    weights = []
    for learning_rate in (None, 1e-3):
        trainer = trainer_on("trunk", learning_rate, name=str(learning_rate), weight_decay=0.1)
        trainer.train()
        weights.append(state(trainer))
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_an_optimizer_without_groups_is_refused():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights[:1], lr=1.0)
    with pytest.raises(UserError, match="a SGD has no groups of parameters; remove it"):
        split_learning_rate(optimizer, weights, 0.1)


@pytest.mark.parametrize("on", ["adapter", "model"])
def test_an_interrupted_run_ends_in_the_same_bits(on, trainer_on, monkeypatch):
    def make(name):
        return trainer_on(on, 3e-3, name, num_rollouts=3, save_strategy="steps", save_steps=1)

    alone, killed = make("alone"), make("killed")
    alone.train()
    collect = killed.collect
    monkeypatch.setattr(killed, "collect", lambda n: collect(n) if n < 2 else pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        killed.train()
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    expected, found = state(alone), state(resumed)
    assert expected.keys() == found.keys() >= alone.actor.critic_names()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("on", ["adapter", "model"])
def test_micro_batches_add_up_to_their_minibatch(on, trainer_on):
    weights = []
    for micro, parts in ((4, 1), (1, 4)):
        cut = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": parts}
        sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "num_rollouts": 2}
        trainer = trainer_on(on, 0.5, name=f"by {micro}", **cut, **sgd)
        before = state(trainer)
        trainer.train()
        weights.append(state(trainer))
    assert any(not torch.equal(before[name], weights[0][name]) for name in trainer.actor.critic_names())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_an_adapter_learns_on_a_quantized_base(quantization, trainer_on):
    trainer = trainer_on("adapter", quantization=quantization, gradient_checkpointing=True)
    before = state(trainer)
    trainer.train()
    changed = {name for name, value in state(trainer).items() if not torch.equal(value, before[name])}
    assert changed & trainer.actor.critic_names() > {"value_head.weight", "value_head.bias"}
    assert changed - trainer.actor.critic_names() - {"kl_coef", "score_sums"}


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        ("model", "ppo: critic: expected a pipeline.Critic, found a str"),
        (Critic("model"), "ppo: critic.model: expected a language model, found None"),
        (Critic("adapter"), "critic.on: adapter needs a policy that is trained with LoRA"),
        (Critic("elsewhere"), "ppo: critic.on: expected trunk or adapter or model, found 'elsewhere'"),
    ],
)
def test_a_critic_that_cannot_be_trained_is_named(critic, message, trainer_on):
    with pytest.raises(UserError, match=message):
        trainer_on("trunk", critic=critic)


def test_an_encoder_is_no_critic(tiny_encoders, trainer_on):
    encoder = AutoModel.from_pretrained(tiny_encoders["bert"])
    encoder.resize_token_embeddings(1000, mean_resizing=False)
    with pytest.raises(UserError, match=r"sees the tokens that it is to predict \(it is an encoder\)"):
        trainer_on("trunk", critic=Critic("model", model=encoder))


def test_layers_that_the_launch_checkpoints_are_refused_with_an_adapter():
    plugin = SimpleNamespace(activation_checkpointing=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(UserError, match="fsdp_activation_checkpointing: true computes a layer again"):
        check_launch(Critic("adapter"), accelerator)
    for critic in (Critic(), Critic("model")):
        check_launch(critic, accelerator)
    check_launch(Critic("adapter"), SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None)))


def test_an_adapter_of_another_base_or_without_a_weight_is_named(tiny_llama):
    policy = lora_policy(tiny_llama)
    weights = get_peft_model_state_dict(policy)
    name = next(iter(weights))
    for changed, message in (
        (
            {key: value for key, value in weights.items() if key != name},
            "critic: its adapter lacks the weight",
        ),
        (weights | {"base_model.model.other.lora_A.weight": weights[name]}, "is for another base, which has"),
        (weights | {name: torch.zeros(4, 7)}, "critic: its adapter is for a base of another shape"),
    ):
        with pytest.raises(UserError, match=message):
            ActorCritic(lora_policy(tiny_llama), 0.1, Critic("adapter", weights=changed))
    actor = ActorCritic(lora_policy(tiny_llama), 0.1, Critic("adapter", weights=weights))
    for key, value in weights.items():
        path = "policy." + key.removesuffix(".weight") + f".{CRITIC}.weight"
        assert torch.equal(actor.get_parameter(path), value.to(actor.get_parameter(path).dtype))
