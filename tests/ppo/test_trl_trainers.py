"""TRL's RLOO and GRPO: the reward reads the exact ids; artifact and evaluation are those of PPO."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline import config
from pipeline.artifacts.inputs import open_inputs
from pipeline.errors import UserError
from pipeline.models.chat import prompt_ids
from pipeline.models.loading import load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.ppo.trl_trainers import RECORD, as_reward_func, filter_prompts, require_plain_batches
from pipeline.reward.functions import RewardSource
from pipeline.reward.token_rewards import StepRewards
from pipeline.sft import stage as sft
from pipeline.training.arguments import build_arguments

TRAINING = {
    "max_steps": 4,
    "num_iterations": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "beta": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "num_generations_eval": 2,
    "disable_tqdm": True,
}


def evenness(prompts, completions, completion_ids, ended, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def stage(records, folder, **more):
    given = {
        "run": "t",
        "runs": str(folder),
        "records": str(records),
        "reward": f"{__name__}:evenness",
        "training": TRAINING,
    }
    return config.PPOStage(**given | {"algorithm": "rloo", "evaluation": {"keep": True}} | more)


def test_the_reward_gets_the_prompt_as_given_the_exact_ids_and_whether_it_ended(tiny_tokenizer):
    seen = {}

    def reward(**given):
        seen.update(given)
        return [3.0, 5.0]

    eos, ids = tiny_tokenizer.eos_token_id, tiny_tokenizer("Paris.")["input_ids"]
    messages = [{"role": "user", "content": "Hello."}]
    told = {}
    trl = {"trainer_state": None, "log_extra": None, "log_metric": told.__setitem__}
    scores = as_reward_func(RewardSource(reward, mean=1.0, std=2.0), tiny_tokenizer, [eos])(
        prompts=[messages] * 2,
        completions=[[{"role": "assistant", "content": "Paris."}]] * 2,
        completion_ids=[[*ids, eos], ids],
        **{
            RECORD: [
                {"prompt": "Hello.", "topic": "a", "images": "none"},
                {"prompt": "Hello.", "topic": "b", "images": "none"},
            ]
        },
        **trl,
    )
    assert seen == {
        "prompts": ["Hello."] * 2,
        "completions": ["Paris."] * 2,
        "completion_ids": [[*ids, eos], ids],
        "ended": [True, False],
        "topic": ["a", "b"],
        "images": ["none", "none"],
    }
    assert scores == [(3 - 1) / 2, (5 - 1) / 2 - 1]  # the penalty of a missing EOS is 1
    assert told == {"raw_reward": 4.0}


def test_rewards_inside_a_response_are_summed_and_it_says_so_once(tiny_tokenizer, capsys):
    eos, ids = tiny_tokenizer.eos_token_id, tiny_tokenizer("Paris. Rome.")["input_ids"]
    rewards = [[0.5] * (len(ids) + 1), StepRewards([1.0, 4.0], [6, 12]), 2.0]
    source = RewardSource(lambda **_: rewards, mean=1.0, std=2.0)
    function = as_reward_func(source, tiny_tokenizer, [eos])
    batch = {"prompts": ["q"] * 3, "completions": ["a"] * 3, "completion_ids": [[*ids, eos]] * 3}
    batch |= {"trainer_state": None, "log_extra": None, "log_metric": lambda *_: None}
    for _ in range(2):
        scores = function(**batch, **{RECORD: [{"prompt": "q"}] * 3})
        assert scores == [((len(ids) + 1) / 2 - 1) / 2, (5 - 1) / 2, (2 - 1) / 2]
    assert capsys.readouterr().out.count("rewards of tokens and steps are summed") == 1


def test_a_response_without_a_reward_is_left_to_trl(tiny_tokenizer):
    """TRL excludes it from the baseline and does not train on it."""
    state, logged = object(), {}

    def reward(completions, trainer_state, log_extra, **_):
        assert trainer_state is state
        log_extra("seen", completions)
        return [None, 3.0]

    eos = tiny_tokenizer.eos_token_id
    function = as_reward_func(RewardSource(reward, mean=1.0, std=2.0), tiny_tokenizer, [eos])
    batch = {"prompts": ["q"] * 2, "completions": ["a"] * 2, "completion_ids": [[eos], [eos]]}
    batch |= {"trainer_state": state, "log_extra": logged.__setitem__, "log_metric": logged.__setitem__}
    assert function(**batch, **{RECORD: [{"prompt": "q"}] * 2}) == [None, 1.0]
    assert logged == {"seen": ["", ""], "raw_reward": 3.0}


def test_a_prompt_is_rendered_as_everywhere_and_one_too_long_is_left_out(tiny_tokenizer, capsys):
    rows = Dataset.from_list([{"prompt": "Hello.", "topic": "a"}, {"prompt": "Hello. " * 40, "topic": "b"}])
    kept = filter_prompts(rows, tiny_tokenizer, 20)
    assert kept.column_names == ["prompt", RECORD]  # an `images` of the user's would be TRL's
    assert kept[RECORD][:] == [{"prompt": "Hello.", "topic": "a"}]
    rendered = tiny_tokenizer.apply_chat_template(
        kept["prompt"][0], add_generation_prompt=True, tokenize=True
    )["input_ids"]
    assert rendered == prompt_ids(tiny_tokenizer, "Hello.")
    assert "1 of 2 prompts are left out: they are empty, over 20 tokens, or spell" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the 1 prompts has 1 to 2 tokens"):
        filter_prompts(rows.select([1]), tiny_tokenizer, 2)


def test_records_keep_their_values_and_messages_all_their_keys(tiny_tokenizer):
    prompt = [{"role": "user", "content": "Hello.", "name": "a"}]
    records = [
        {"prompt": prompt, "ids": [1, None], "meta": {"a": {"b": 0.5}, "c": None}, "rank": 2, "none": None},
        {"prompt": prompt, "ids": [], "meta": None, "rank": None, "none": None},
    ]
    rows = Dataset.from_list(records)
    kept = filter_prompts(rows, tiny_tokenizer, 20)
    assert kept[:] == {"prompt": [prompt, prompt], RECORD: records}
    assert kept.features[RECORD] == rows.features


def test_a_policy_that_needs_its_own_batches_is_for_ppo_alone(tiny_tokenizer):
    size = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    bart = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bart", vocab_size=len(tiny_tokenizer), init_std=0.2, **size)
    )
    with pytest.raises(UserError, match=r"algorithm: rloo pads prompts and uses a cache.*use algorithm: ppo"):
        require_plain_batches("rloo", bart)


def test_trl_samples_no_ids_that_the_tokenizer_does_not_have(tiny_records, tiny_gpt2, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    policy.resize_token_embeddings(2 * len(tokenizer))
    policy.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    config_of = stage(tiny_records, tmp_path, policy=str(tmp_path / "wide"))
    args = build_arguments(config_of, ppo.arguments_class(config_of), tmp_path / "work")
    inputs = open_inputs(config_of)
    trainer = ppo.build_trainer(config_of, inputs, args)
    unknown = list(range(len(tokenizer), 2 * len(tokenizer)))
    assert trainer.generation_config.suppress_tokens == unknown


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_it_learns(algorithm, tiny_records, tiny_gpt2, tmp_path):
    more = {
        "max_steps": 60,
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "learning_rate": 5e-3,
        "beta": 0.0,
    }
    more |= {"eval_on_start": True, "eval_steps": 60, "save_steps": 60}
    folder = ppo.run(
        stage(tiny_records, tmp_path, policy=str(tiny_gpt2), algorithm=algorithm, training=TRAINING | more)
    )
    entries = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    before, after = [entry for entry in entries if "eval_reward" in entry][:2]
    assert after["eval_reward"] > before["eval_reward"] + 0.05
    assert before["eval_kl"] == pytest.approx(0, abs=1e-4)
    assert after["eval_kl"] > 1


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
@pytest.mark.parametrize("form", ["full", "lora on an adapter"])
def test_the_artifact_is_ppos_and_goes_on_after_a_kill(
    algorithm, form, tiny_records, tiny_gpt2, tmp_path, monkeypatch
):
    policy, lora = str(tiny_gpt2), None
    if form != "full":
        learning = {"max_steps": 2, "learning_rate": 1e-2}
        given = {"model": policy, "max_length": 96, "lora": {"r": 4}, "training": learning}
        policy, lora = (
            str(sft.run(config.SFTStage(run="t", runs=str(tmp_path), records=str(tiny_records), **given))),
            {},
        )
    given = stage(tiny_records, tmp_path, policy=policy, algorithm=algorithm, lora=lora)
    write = ppo.write_log
    monkeypatch.setattr(ppo, "write_log", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ppo.run(given)
    monkeypatch.setattr(ppo, "write_log", write)
    folder = ppo.run(given)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["kind"] == "policy"
    assert {"eval_reward", "eval_kl", "eval_ended_fraction", "best_step"} <= manifest["metrics"].keys()
    assert sorted(file.name for file in (folder / "policies").iterdir()) == [
        "step-000002"
    ]  # the last is the artifact itself
    assert {json.loads(line)["step"] for line in (folder / "samples.jsonl").open(encoding="utf-8")} == {2, 4}
    weights = "model.safetensors" if form == "full" else "adapter_model.safetensors"
    last, kept, source = (
        load_file(place / weights) for place in (folder, folder / "policies" / "step-000002", Path(policy))
    )
    assert last.keys() == kept.keys() == source.keys()
    assert not all(last[name].equal(kept[name]) for name in last)
    assert not all(last[name].equal(source[name]) for name in last)
    AutoModelForCausalLM.from_pretrained(folder)
    load_tokenizer(str(folder / "best"))


def test_keys_are_those_of_trls_own_class(tiny_records, tiny_gpt2, tmp_path):
    for wrong, message in (
        ({"kl_coef": 0.1}, "RLOOConfig has no such key"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"reward_weights": [1.0]}, "the weights of 'reward'"),
    ):
        with pytest.raises(UserError, match=message):
            ppo.check(stage(tiny_records, tmp_path, policy=str(tiny_gpt2), training=TRAINING | wrong))


def test_trls_trainers_keep_the_policy_to_themselves(tiny_records, tmp_path):
    given = stage(tiny_records, tmp_path, policy="p", lora={})
    assert (
        incompatibility(given, None, None)
        == "algorithm: rloo is TRL's own trainer, which keeps the policy to itself"
    )


def test_after_a_kill_the_best_is_of_the_run_that_lives(tiny_records, tiny_gpt2, tmp_path, monkeypatch):
    """The dead run's best came after its last checkpoint: the one that goes on draws other samples, and finds
    its own.
    """
    given = stage(
        tiny_records, tmp_path, policy=str(tiny_gpt2), training=TRAINING | {"max_steps": 6, "save_steps": 4}
    )
    from pipeline.ppo.policy_trainer import PolicyTrainer

    keep = PolicyTrainer._keep_policy

    def best_then_killed(trainer, figure):
        if trainer.state.global_step == 6:
            keep(trainer, 9.0)
            raise KeyboardInterrupt
        keep(trainer, figure)

    monkeypatch.setattr(PolicyTrainer, "_keep_policy", best_then_killed)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(given)
    monkeypatch.setattr(PolicyTrainer, "_keep_policy", keep)
    folder = ppo.run(given)
    step = json.loads((folder / "manifest.json").read_text())["metrics"]["best_step"]
    best = load_file(folder / "best" / "model.safetensors")
    same = load_file((folder if step == 6 else folder / "policies" / f"step-{step:06}") / "model.safetensors")
    assert all(best[name].equal(same[name]) for name in best)
    assert step == 6


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_policy_that_grew_has_a_reference_as_large(algorithm, tiny_records, tiny_gpt2, tmp_path):
    """As GPT-2's does, whose tokenizer brings no pad token."""
    AutoModelForCausalLM.from_pretrained(tiny_gpt2).save_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    grown = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|another pad|>"})
    tokenizer.save_pretrained(tmp_path / "policy")
    folder = ppo.run(stage(tiny_records, tmp_path, policy=str(tmp_path / "policy"), algorithm=algorithm))
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == grown + 1


def test_too_few_prompts_to_fill_a_batch_are_an_error(tiny_records, tiny_gpt2, tmp_path):
    wrong = TRAINING | {"per_device_train_batch_size": 512}
    with pytest.raises(
        UserError, match=r"\d+ prompts to train on, and algorithm: rloo samples responses to 256 at a time"
    ):
        ppo.run(stage(tiny_records, tmp_path, policy=str(tiny_gpt2), training=wrong))


def test_what_trl_refuses_late_is_one_line(tiny_records, tiny_gpt2, tmp_path):
    with pytest.raises(UserError, match="save_strategy: best is not for algorithm: rloo"):
        ppo.check(
            stage(
                tiny_records, tmp_path, policy=str(tiny_gpt2), training=TRAINING | {"save_strategy": "best"}
            )
        )
    with pytest.raises(UserError, match=r"algorithm: rloo: .*sync_ref_model"):
        ppo.run(
            stage(
                tiny_records,
                tmp_path,
                policy=str(tiny_gpt2),
                training=TRAINING | {"sync_ref_model": True, "beta": 0.0},
            )
        )
