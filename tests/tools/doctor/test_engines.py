"""`rlhf doctor` of a run whose rollouts servers sample: the servers, the command, and the memory."""

import pytest

from pipeline import config
from pipeline.errors import UserError
from pipeline.tools.doctor.engines import check_engine
from pipeline.tools.doctor.examine import examine
from pipeline.tools.doctor.memory import estimate
from pipeline.tools.doctor.plans import plan_stage, stage_arguments
from tests.engines.stand_in import POSTED, stand_in


@pytest.fixture
def stage(tiny_records, tiny_gpt2, tmp_path):
    def build(*urls, **keys):
        common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_records), "policy": str(tiny_gpt2)}
        reward, training = "pipeline.prepare.demo:gold_reward", {"response_tokens": 100}
        rollouts = {"rollouts": {"url": list(urls), "timeout": 5}} if urls else {}
        return config.PPOStage(**common, reward=reward, training=training, **rollouts, **keys)

    return build


def test_the_servers_are_checked_and_the_command_that_starts_them_is_said(stage, tiny_gpt2, tiny_llama):
    with stand_in(tiny_gpt2) as right, stand_in(tiny_llama) as other:
        each = stage(right.url, other.url)
        findings, errors = examine(each, {"ppo": each}, None)
    lines = [text for name, text in findings if name == "engine"]
    command = f"VLLM_SERVER_DEV_MODE=1 vllm serve {tiny_gpt2} --dtype float32"
    assert lines[0].startswith(f"weights by folder; start a server with: {command}")
    assert lines[1] == f"{right.url}: serves {tiny_gpt2}, rows of up to 128 tokens, and accepts new weights"
    assert lines[2].startswith(
        f"error: {other.url}: serves {tiny_llama}, expected {tiny_gpt2}; start it with"
    )
    assert errors == 1


def test_a_server_that_cuts_rows_lacks_lora_or_is_away_is_an_error(stage, tiny_gpt2):
    with stand_in(tiny_gpt2, posted=POSTED - {"/v1/load_lora_adapter"}) as server:
        with pytest.raises(UserError, match="accepts 128 tokens, but a prompt and response have up to 129"):
            check_engine(stage(server.url), server.url, 129)
        with pytest.raises(UserError, match=f"serves {tiny_gpt2}, but accepts no LoRA adapters; start it"):
            check_engine(stage(server.url, lora={"r": 4}), server.url, 128)
    with pytest.raises(UserError, match=f"^{server.url}/v1/models: no response: "):
        check_engine(stage(server.url), server.url, 128)


def test_the_memory_is_without_the_rollouts_keys_and_values(stage):
    sizes = []
    for each in (stage(), stage("http://h:1")):
        sizes.append(estimate(*plan_stage(each, {"ppo": each}, stage_arguments(each), 20)))
    assert sizes[0]["KV cache"] > 0
    assert sizes[1]["KV cache"] == 0
    assert sizes[1]["peak"] <= sizes[0]["peak"]
    same = sizes[0].keys() - {"KV cache", "peak"}
    assert {name: sizes[0][name] for name in same} == {name: sizes[1][name] for name in same}
