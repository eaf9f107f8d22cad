"""PPO from end to end on the real engine: at every rollout it samples from the policy of that step."""

import json
from contextlib import ExitStack

import pytest

from pipeline import config
from pipeline.engines.sampler import EngineSampler
from pipeline.errors import UserError
from pipeline.models.scratch import train_tokenizer
from pipeline.ppo import stage as ppo
from tests.engines.conftest import SAMPLES, new_llama, serve

pytestmark = pytest.mark.engines
TRAINING = {
    "num_rollouts": 3,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "per_device_train_batch_size": 8,
    "response_tokens": 12,
    "min_response_tokens": 2,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.9,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory, demo_texts):
    tokenizer = train_tokenizer(demo_texts, config.Scratch(vocabulary=700), "\n")
    folder = tmp_path_factory.mktemp("policy")
    new_llama(tokenizer, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(policy):
    with serve(policy, *SAMPLES) as url:
        yield url


@pytest.fixture
def stage(policy, tiny_records, tmp_path):
    def build(url, **keys):
        common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_records), "policy": str(policy)}
        reward = "pipeline.prepare.demo:gold_reward"
        rollouts = {"url": url, "timeout": 20}
        return config.PPOStage(**common, reward=reward, training=TRAINING, rollouts=rollouts, **keys)

    return build


def read_log(folder, key):
    """Return the values of a key in the log of a run, in order."""
    log = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    return [entry[key] for entry in log if key in entry]


@pytest.mark.parametrize("lora", [{"r": 4, "init_lora_weights": True}, None], ids=["adapter", "full"])
def test_at_every_rollout_the_engine_samples_from_the_trainers_policy(lora, stage, url):
    folder = ppo.run(stage(url, lora=lora))
    gaps = read_log(folder, "sampler/logprob_gap_max")
    assert len(gaps) == 3
    assert 0 < max(gaps) < 1e-4
    assert max(read_log(folder, "sampler/kl")) < 1e-6
    assert read_log(folder, "sampler/capped_fraction") == [0, 0, 0]
    assert read_log(folder, "sampler/excluded_fraction") == [0, 0, 0]
    assert max(read_log(folder, "objective/kl")) > 0.01  # the policy has moved
    assert min(read_log(folder, "response/tokens")) > 2


def test_an_engine_that_is_killed_stops_the_run_which_resumes_with_another(
    stage, url, policy, tmp_path, monkeypatch
):
    with ExitStack() as running, pytest.MonkeyPatch.context() as patch:
        first, update = running.enter_context(serve(policy, *SAMPLES)), EngineSampler.update

        def update_and_kill(sampler, step, write):
            update(sampler, step, write)
            if step == 4:
                running.close()

        patch.setattr(EngineSampler, "update", update_and_kill)
        with pytest.raises(UserError, match=rf"^{first}/\S+: no response: .*start one with: vllm serve"):
            ppo.run(stage(first))
    assert {path.name for path in tmp_path.rglob("checkpoint-*")} >= {"checkpoint-2"}
    folder = ppo.run(stage(url))
    gaps = read_log(folder, "sampler/logprob_gap_max")
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
