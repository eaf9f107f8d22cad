"""Published policies on servers, as evaluate samples them: each is brought there first."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import config
from pipeline.artifacts.inputs import require_artifact
from pipeline.engines.policies import bring_policy, open_servers
from pipeline.engines.weight_probe import ROWS
from pipeline.errors import UserError
from pipeline.evaluate.sampling import sample_policies
from pipeline.models.loading import load_sampler
from tests.engines.stand_in import POSTED, stand_in

PROMPTS = Dataset.from_dict({"prompt": ["w3 w4", "w5", "w6 w7 w8"]})


@pytest.fixture
def adapter(word_policy, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(word_policy), lora).save_pretrained(tmp_path / "ppo")
    AutoTokenizer.from_pretrained(word_policy).save_pretrained(tmp_path / "ppo")
    return tmp_path / "ppo"


def test_evaluate_samples_each_policy_on_the_server(word_policy, adapter):
    inputs = {
        name: require_artifact(str(folder), "policy", "")
        for name, folder in {"sft": word_policy, "ppo": adapter}.items()
    }
    with stand_in(word_policy) as server:
        stage = config.EvaluateStage(
            run="t",
            rollouts={"url": server.url, "timeout": 20},
            response_tokens=4,
            samples_per_prompt=2,
            best_of=3,
        )
        samples = sample_policies(stage, inputs, PROMPTS)
    calls = [
        body.get("model") or body.get("lora_path") or body["kwargs"]["weights_path"]
        for path, body in server.asked[1:]  # the first asks what log-probabilities are sent
        if path not in ("/pause", "/resume", "/reset_prefix_cache", "/update_weight_version")
    ]
    name = calls[-1]
    assert calls == [str(word_policy), "base", "base", str(adapter), name, name]  # compared, then sampled
    assert name.startswith("ppo-")
    assert {key: len(columns["ids"]) for key, columns in samples.items()} == {"sft": 9, "ppo": 6}
    sent = server.sampled[1 + ROWS :]
    assert [samples["sft"]["ids"], samples["ppo"]["ids"]] == [sent[:9], sent[9 + ROWS :]]
    assert "rollouts" not in config.EvaluateStage(run="t").resolved()
    assert stage.resolved()["rollouts"] == {"engine": "vllm"}


def test_a_server_with_the_adapter_of_another_base_is_an_error(word_policy, adapter, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(word_policy)
    for weight in other.parameters():
        torch.nn.init.normal_(weight)
    other.save_pretrained(tmp_path / "other")
    policy, tokenizer = load_sampler(str(adapter))
    with stand_in(tmp_path / "other") as server:
        sampler = open_servers(config.EngineSection(url=[server.url], timeout=5))
        bring_policy(sampler, str(adapter), "ppo")
        with pytest.raises(UserError, match=r"differ from the policy's by .* nats, expected below 1"):
            sampler(policy, tokenizer, [[3, 4]], torch.zeros(1, 4))


def test_a_server_that_does_not_take_a_policy_is_refused(word_policy, adapter):
    with stand_in(word_policy, posted=POSTED - {"/v1/load_lora_adapter", "/collective_rpc"}) as server:
        sampler = open_servers(config.EngineSection(url=[server.url], timeout=5))
        with pytest.raises(
            UserError, match=f"serves {word_policy}, but accepts no LoRA adapters for {adapter}"
        ):
            bring_policy(sampler, str(adapter), "ppo")
        with pytest.raises(
            UserError, match=f"but loads no new weights for {word_policy}; start it with: VLLM_S"
        ):
            bring_policy(sampler, str(word_policy), "sft")
    with stand_in(word_policy) as server:
        sampler = open_servers(config.EngineSection(url=[server.url], timeout=5))
        server.faults = [None, None, (400, "no such folder"), None]
        with pytest.raises(
            UserError, match=r"does not take /collective_rpc for the weights .*'no such folder'"
        ):
            bring_policy(sampler, str(word_policy), "sft")
        assert [path for path, _ in server.asked[-2:]] == ["/collective_rpc", "/resume"]
