"""PPO whose responses servers sample: each gets the policy of a step first, and no fault is trained on."""

import json
import time

import pytest
import torch

from pipeline import config
from pipeline.engines import requests
from pipeline.engines.policy_server import PolicyServer
from pipeline.engines.weights import WeightSync
from pipeline.errors import UserError
from pipeline.models.logprobs import response_logprobs
from pipeline.ppo import engines
from pipeline.ppo import stage as ppo
from pipeline.ppo.trainer import PPOTrainer
from tests.engines.stand_in import stand_in

TRAINING = {
    "num_rollouts": 2,
    "num_ppo_epochs": 1,
    "num_mini_batches": 2,
    "per_device_train_batch_size": 2,
    "response_tokens": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "temperature": 0.8,
    "score_normalization": "none",
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_samples": 1,
    "report_to": "none",
}


class RecordedSync(WeightSync):
    """Remembers the steps that it was asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps, self.written = [], []

    def update(self, step, write):
        self.steps.append(step)
        served = super().update(step, write)
        self.written.append(sorted(path.name for path in self.folder.iterdir()))
        assert not list(self.folder.rglob("critic"))
        return served


@pytest.fixture
def syncs(monkeypatch):
    """The syncs of the runs of a test, in order."""
    built = []
    monkeypatch.setattr(engines, "build_sync", lambda *args: built.append(RecordedSync(*args)) or built[-1])
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(requests, "IDLE", {})
    return built


@pytest.fixture
def gaps(monkeypatch):
    """The largest difference between the servers' log-probabilities and the policy's, in each rollout."""
    measured, sample = [], PPOTrainer.sample

    def sample_and_compare(trainer, *args):
        responses, policy = sample(trainer, *args), trainer.actor.policy
        policy.eval()
        tensors = (responses.query_ids, responses.query_mask, responses.response_ids, responses.response_mask)
        with torch.no_grad():
            logprobs = response_logprobs(policy, *tensors, TRAINING["temperature"]).logprobs
        measured.append(float((logprobs - responses.sampler_logprobs).abs().max()))
        return responses

    monkeypatch.setattr(PPOTrainer, "sample", sample_and_compare)
    return measured


@pytest.fixture
def stage(tiny_records, tiny_gpt2, tmp_path):
    def build(*urls, **keys):
        training = TRAINING | keys.pop("training", {})
        common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_records), "policy": str(tiny_gpt2)}
        reward = "pipeline.prepare.demo:gold_reward"
        rollouts = {"url": list(urls), "timeout": 20}
        return config.PPOStage(**common, reward=reward, training=training, rollouts=rollouts, **keys)

    return build


@pytest.mark.parametrize("lora", [None, {"r": 4, "init_lora_weights": True}], ids=["full", "adapter"])
def test_servers_sample_from_the_policy_of_each_step(lora, stage, syncs, gaps, tiny_gpt2):
    with stand_in(tiny_gpt2) as first, stand_in(tiny_gpt2) as second:
        folder = ppo.run(stage(first.url, second.url, lora=lora))
        asked = [
            [body["model"] for path, body in server.asked if path == "/v1/completions"]
            for server in (first, second)
        ]
    (sync,) = syncs
    assert sync.method == ("folder" if lora is None else "adapter")
    assert sync.steps == [0, 2, 2, 4, 4]  # before each rollout and evaluation, and at the end
    assert len(gaps) >= 5
    assert max(gaps) < 1e-4
    names = ["base"] if lora is None else [f"step-{step:06}" for step in (0, 2, 4)]
    for models in asked:
        assert models.pop(0) == "base"  # asked for before the run
        assert list(dict.fromkeys(models)) == names
    assert sync.written == [[f"step-{step:06}"] for step in sync.steps]
    log = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    assert [entry["step"] for entry in log if "eval_reward" in entry] == [2, 4, 4]


def test_a_server_gone_for_good_is_one_line_and_the_run_resumes(stage, syncs, gaps, tiny_gpt2, tmp_path):
    quiet = {"eval_strategy": "no"}
    with stand_in(tiny_gpt2) as first, stand_in(tiny_gpt2) as second:
        update = RecordedSync.update

        def update_and_end(sync, step, write):
            served = update(sync, step, write)
            if step == 2:
                second.stop()
            return served

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RecordedSync, "update", update_and_end)
            with pytest.raises(UserError, match=rf"^{second.url}/weight_info: no response: .*20 s\)$"):
                ppo.run(stage(first.url, second.url, training=quiet))
        assert {path.name for path in tmp_path.rglob("checkpoint-*")} >= {"checkpoint-2"}
        folder = ppo.run(stage(first.url, training=quiet))
    assert [sync.steps for sync in syncs] == [[0, 2], [2, 4]]
    assert max(gaps) < 1e-4
    log = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    assert [entry["step"] for entry in log if "objective/kl" in entry] == [2, 4]


def test_a_server_that_lacks_what_the_run_needs_is_refused_with_the_command(stage, tiny_gpt2):
    with stand_in(tiny_gpt2, posted={"/v1/completions"}) as server:
        with pytest.raises(UserError) as error:
            engines.require_servers(stage(server.url, lora={"r": 12}))
        assert str(error.value) == (
            f"{server.url}: serves {tiny_gpt2}, but accepts no LoRA adapters; start it with: "
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {tiny_gpt2} --enable-lora --max-lora-rank 16 "
            "--dtype float32 --logprobs-mode processed_logprobs"
        )
        with pytest.raises(UserError) as error:
            engines.require_servers(stage(server.url))
        assert str(error.value).endswith(
            f"but loads no new weights; start it with: VLLM_SERVER_DEV_MODE=1 vllm serve {tiny_gpt2} "
            "--dtype float32 --logprobs-mode processed_logprobs"
        )


def test_a_server_of_another_base_is_told_where_it_can_be(tmp_path, tiny_gpt2):
    server = PolicyServer("http://h:1", "base", str(tiny_gpt2))
    assert engines.base_problem(server, str(tiny_gpt2)) == ""
    (tmp_path / "link").symlink_to(tiny_gpt2)
    assert engines.base_problem(server, str(tmp_path / "link")) == ""
    assert engines.base_problem(server, str(tmp_path)) == f"serves {tiny_gpt2}, expected {tmp_path}"
    assert engines.base_problem(server._replace(path="Qwen/Qwen3-0.6B"), str(tmp_path)) != ""
    assert engines.base_problem(server._replace(path="/on/another/machine"), str(tmp_path)) == ""


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "adapter"])
def test_a_server_that_is_started_again_has_missed_an_update(lora, stage, syncs, tiny_gpt2):
    with stand_in(tiny_gpt2) as server:
        update = RecordedSync.update

        def update_and_restart(sync, step, write):
            served = update(sync, step, write)
            if step == 2:
                server.restart()
            return served

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RecordedSync, "update", update_and_restart)
            message = (
                r"/weight_info .*'\{\"weight_version\": \"default\"\}'; expected the version \w+/step-000002"
            )
            if lora:
                message = (
                    "expected the model 'step-000002': the server was started again, or missed an update"
                )
            with pytest.raises(UserError, match=message):
                ppo.run(stage(server.url, lora=lora, training={"eval_strategy": "no"}))


def test_a_server_whose_base_was_replaced_is_refused_under_lora(stage, syncs, tiny_gpt2):
    with stand_in(tiny_gpt2) as server:
        server.version = "of another run"
        with pytest.raises(UserError, match=r"of another run.*; expected the version default: the server"):
            ppo.run(stage(server.url, lora={"r": 4}))
