"""The real engine samples from the weights that it was brought last."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.engines.policy_server import probe_policy_server
from pipeline.engines.sampler import EngineSampler
from pipeline.engines.weights import WeightSync

pytestmark = pytest.mark.engines
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]] * 4


@pytest.mark.parametrize("method", ["adapter", "folder"])
def test_log_probabilities_are_those_of_the_last_update(method, sampling_server, word_policy, tmp_path):
    server = probe_policy_server(sampling_server, 60)
    policy = AutoModelForCausalLM.from_pretrained(word_policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(word_policy)
    if method == "adapter":
        policy = get_peft_model(policy, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    old = policy
    sampler = EngineSampler([server], 60, WeightSync([server], method, tmp_path / "weights", 60))
    for step in (0, 2, 4):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        sampler.update(step, policy.save_pretrained)
        responses = sampler(policy, tokenizer, PROMPTS, torch.zeros(len(PROMPTS), 8))
        assert largest_gap(policy, responses, len(tokenizer)) < 1e-4
        old = old if step else copy.deepcopy(policy)
    assert largest_gap(old, responses, len(tokenizer)) > 0.1
    assert sampler.model == ("step-000004" if method == "adapter" else None)


@torch.no_grad()
def largest_gap(policy, responses, words):
    """Return the largest difference of log-probabilities between the engine and a policy."""
    gaps = []
    for prompt, ids, theirs in zip(PROMPTS, responses.token_lists(), responses.sampler_logprobs, strict=True):
        logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :words]
        ours = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        gaps.append(float((ours - theirs[: len(ids)]).abs().max()))
    return max(gaps)
