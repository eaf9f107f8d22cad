"""A critic of its own: what it computes and learns, where it starts, and what is written of it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.critic import CRITIC, Critic

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
