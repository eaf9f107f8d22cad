"""Adapters that are refused in one line, and what a merged one computes."""

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import RewardModel
from pipeline.errors import UserError
from pipeline.models.adapters import add_adapter, read_adapter
from pipeline.models.loading import (
    head_config,
    load_classifier,
    load_merged_policy,
    load_policy,
    load_tokenizer,
)

IDS = torch.tensor([[5, 6, 7, 8]])
LM = {"task_type": TaskType.CAUSAL_LM}


@pytest.fixture
def save_adapter(tiny_llama, tiny_tokenizer, tmp_path):
    """A function that saves an adapter with random weights, and returns the model and the folder."""

    def save(adapter, base=tiny_llama):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        folder = tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return model, str(folder)

    return save


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        (PromptTuningConfig(num_virtual_tokens=3, **LM), "PROMPT_TUNING"),
        (PrefixTuningConfig(num_virtual_tokens=3, **LM), "PREFIX_TUNING"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[], **LM), "IA3"),
    ],
)
def test_adapters_of_other_kinds_are_refused(adapter, kind, save_adapter):
    folder = save_adapter(adapter)[1]
    tokenizer = load_tokenizer(folder)
    head = head_config(["reward"], "regression")
    for load in (
        lambda: load_policy(folder, tokenizer),
        lambda: load_merged_policy(folder, tokenizer),
        lambda: load_classifier(folder, tokenizer, head=head),
        lambda: RewardModel.load(folder),
    ):
        with pytest.raises(
            UserError, match=f"is an adapter of PEFT's type {kind}; .* merge it .* or use LoRA"
        ):
            load()


@pytest.mark.parametrize(
    ("setting", "trained_only"),
    [
        ({"bias": "all"}, True),
        ({"lora_bias": True}, True),
        ({"init_lora_weights": "pissa_niter_2"}, False),
    ],
)
def test_adapters_that_cannot_be_trained_or_loaded_again_are_refused(setting, trained_only, save_adapter):
    folder = save_adapter(LoraConfig(r=2, target_modules=["q_proj"], **LM, **setting))[1]
    tokenizer = load_tokenizer(folder)
    (key,) = setting
    with pytest.raises(UserError, match=f"its adapter has {key}="):
        load_policy(folder, tokenizer, trainable=True)
    if trained_only:
        load_policy(folder, tokenizer)
    else:
        with pytest.raises(UserError, match="its decomposition of the base is random"):
            load_policy(folder, tokenizer)


def test_an_adapter_without_a_base_is_refused(tmp_path):
    LoraConfig(r=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="names no base"):
        read_adapter(str(tmp_path), None, TaskType.CAUSAL_LM, "policy")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"r": 0},
            "sft: lora.r=0: `r` should be a positive integer value but the value passed is 0; change it",
        ),
        (
            {"target_modules": ["q_proj", "v_porj"]},
            "sft: lora.target_modules: the model has no module 'v_porj'; did you mean 'v_proj'?; name others"
            ", or try lora.target_modules=all-linear",
        ),
        (
            {"modules_to_save": ["reward"]},
            "sft: lora.modules_to_save: the model has no module 'reward'; name",
        ),
        (
            {"layers_to_transform": [9]},
            "sft: lora.layers_to_transform=[9]: Target modules {'q_proj', 'v_proj'} not found in the base",
        ),
        ({"init_lora_weights": "corda"}, "sft: lora: `eigens` attribute not found for layer"),
        ({"lora_dropout": 2.0}, "sft: lora: dropout probability has to be between 0 and 1, but got 2.0"),
    ],
)
def test_what_peft_refuses_is_one_line_with_the_key(lora, message, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"]} | lora)
    with pytest.raises(UserError) as error:
        add_adapter(model, config, "sft: lora")
    assert str(error.value).replace("{'v_proj', 'q_proj'}", "{'q_proj', 'v_proj'}").startswith(message)


def test_an_architecture_that_peft_does_not_know_needs_its_modules():
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = AutoConfig.for_model("phi3", vocab_size=50, num_key_value_heads=2, pad_token_id=0, **size)
    model = AutoModelForCausalLM.from_config(shape)
    with pytest.raises(UserError, match=r"lora: .*target_modules.*; try lora.target_modules=all-linear"):
        add_adapter(model, LoraConfig())


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_a_merged_adapter_computes_the_same_and_can_be_trained(init, save_adapter, tiny_llama):
    adapter, folder = save_adapter(LoraConfig(r=2, init_lora_weights=init, target_modules=["q_proj"], **LM))
    merged = load_merged_policy(folder, load_tokenizer(folder))
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), logits(adapter), atol=1e-5, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert (logits(merged) - logits(plain)).abs().max() > 1e-2
    assert {name for name, p in merged.named_parameters() if not p.requires_grad} == set()
    assert merged.name_or_path == folder


def test_an_adapter_of_an_adapter_is_loaded_on_the_merged_one(save_adapter, tiny_llama):
    first, folder = save_adapter(LoraConfig(r=2, target_modules=["q_proj"], **LM))
    tokenizer = load_tokenizer(folder)
    model = add_adapter(
        load_merged_policy(folder, tokenizer),
        LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, **LM),
    ).eval()
    second = f"{folder}-second"
    model.save_pretrained(second)
    torch.testing.assert_close(logits(load_policy(second, tokenizer)), logits(model), atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(first), atol=1e-5, rtol=1e-4)


def test_a_classifier_on_a_merged_adapter_can_be_trained(save_adapter):
    folder = save_adapter(LoraConfig(r=2, target_modules=["q_proj"], **LM))[1]
    head = head_config(["reward"], "regression")
    model = load_classifier(folder, load_tokenizer(folder), head=head)
    model(IDS).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
