"""The real engine samples from the weights of each optimizer step, and a missed update is an error."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.engines import weights
from pipeline.engines.policy_server import probe_policy_server, request_logprobs
from pipeline.engines.sampler import EngineSampler
from pipeline.engines.weights import WeightSync
from pipeline.errors import UserError

pytestmark = pytest.mark.engines
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]] * 4


class Run:
    """A policy, the sampler of its server, and optimizer steps."""

    def __init__(self, url, method, word_policy, tmp_path, rate=1e-2):
        self.policy = AutoModelForCausalLM.from_pretrained(word_policy).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(word_policy)
        if method == "adapter":
            self.policy = get_peft_model(self.policy, LoraConfig(r=4, task_type="CAUSAL_LM"))
        server = probe_policy_server(url, 60)
        self.sampler = EngineSampler([server], 60, WeightSync([server], method, tmp_path / "weights", 60))
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer, self.number = torch.optim.Adam(trained, rate), 0

    def step(self):
        ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
        self.policy(ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.number += 1

    def sample(self):
        """Return the largest difference of log-probabilities between the engine and the policy."""
        self.sampler.update(self.number, self.policy.save_pretrained)
        responses = self.sampler(self.policy, self.tokenizer, PROMPTS, torch.zeros(len(PROMPTS), 8))
        return responses, largest_gap(self.policy, responses, len(self.tokenizer))


@pytest.mark.parametrize("method", ["adapter", "folder"])
def test_log_probabilities_are_those_of_each_optimizer_step(method, sampling_server, word_policy, tmp_path):
    run = Run(sampling_server, method, word_policy, tmp_path)
    start, gaps = copy.deepcopy(run.policy), []
    for _ in range(4):
        responses, gap = run.sample()
        gaps.append(gap)
        assert [path.name for path in run.sampler.sync.folder.iterdir()] == [f"step-{run.number:06}"]
        run.step()
    assert max(gaps) < 1e-4
    assert largest_gap(start, responses, len(run.tokenizer)) > 0.01
    assert run.sampler.model == ("step-000003" if method == "adapter" else None)


def test_an_engine_that_does_not_load_what_it_was_sent_is_an_error(
    sampling_server, word_policy, tmp_path, monkeypatch
):
    run = Run(sampling_server, "folder", word_policy, tmp_path, rate=1e-3)
    for _ in range(2):
        run.sample()
        run.step()
    post = weights._post
    monkeypatch.setattr(
        weights,
        "_post",
        lambda server, path, body, timeout, *tries: post(
            server, "/reset_prefix_cache" if path == "/collective_rpc" else path, body, timeout, *tries
        ),
    )
    with pytest.raises(UserError, match="has missed an update or a part of one"):
        run.sample()


def test_an_adapter_and_weights_that_the_engine_refuses_are_one_line(sampling_server, word_policy, tmp_path):
    server = probe_policy_server(sampling_server, 60)
    large = get_peft_model(
        AutoModelForCausalLM.from_pretrained(word_policy), LoraConfig(r=16, task_type="CAUSAL_LM")
    )
    large.save_pretrained(tmp_path / "large")
    (before,) = request_logprobs(server, [[3, 4, 5]], 60)
    with pytest.raises(UserError, match=r"does not take the adapter .*/large: .*rank 16 is greater than max"):
        weights.load_adapter(server, tmp_path / "large", "large", 5)
    (after,) = request_logprobs(server, [[3, 4, 5]], 60)
    common = before.keys() & after.keys()  # the sampled token comes beside the 20 likeliest
    assert len(common) >= 20
    assert {t: after[t] for t in common} == pytest.approx({t: before[t] for t in common}, abs=1e-6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"/empty: .*Cannot find any model weights.*starts it again"):
        weights.reload_weights(server, tmp_path / "empty", "none", 5)  # vLLM ends then


@torch.no_grad()
def largest_gap(policy, responses, words):
    """Return the largest difference of log-probabilities between the engine and a policy."""
    gaps = []
    for prompt, ids, theirs in zip(PROMPTS, responses.token_lists(), responses.sampler_logprobs, strict=True):
        logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :words]
        ours = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        gaps.append(float((ours - theirs[: len(ids)]).abs().max()))
    return max(gaps)
