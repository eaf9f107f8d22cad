"""A scorer that is not trained on sees when the policy exploits its reward, stops the run, and picks the
best.
"""

import json

import pytest
import torch

from pipeline import config
from pipeline.errors import UserError
from pipeline.evaluate.sampling import response_kl
from pipeline.models import logprobs
from pipeline.models.loading import load_policy
from pipeline.ppo import stage as ppo
from pipeline.ppo.callbacks import EarlyStopping
from pipeline.ppo.evaluation import kl_and_values, overoptimization_warning
from pipeline.reward import stage as reward

from .test_trainer import PROMPTS, evenness, trainer_of

RISING = {
    "num_rollouts": 40,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "kl_coef": 0.0,
    "max_kl": None,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "lr_scheduler_type": "constant",
}


def some_evenness(completion_ids, **_):
    """What was wanted: half of the tokens even and a little more; the reward takes all of them."""
    return [1 - abs(share - 0.6) for share in evenness(None, None, completion_ids, None)]


@pytest.fixture
def policy(tiny_gpt2, tiny_tokenizer):
    return load_policy(str(tiny_gpt2), tiny_tokenizer)


def watched(policy, tokenizer, folder, patience, **more):
    trainer = trainer_of(policy, tokenizer, folder, **RISING | more)
    trainer.scorer = some_evenness
    trainer.eval_dataset = PROMPTS.select([i % 4 for i in range(64)])
    trainer.add_callback(EarlyStopping(patience))
    return trainer


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_scorer_reward" in entry]


def test_the_run_stops_after_the_peak_and_says_why(policy, tiny_tokenizer, tmp_path, capsys):
    trainer = watched(policy, tiny_tokenizer, tmp_path, patience=3)
    trainer.train()
    seen, said = evaluations(trainer), capsys.readouterr().out
    best = max(range(len(seen)), key=lambda i: seen[i]["eval_scorer_reward"])
    assert trainer.state.global_step == seen[best]["step"] + 3 * 4 < 80
    assert trainer.state.best_global_step == seen[best]["step"]
    assert seen[-1]["eval_reward"] > seen[best]["eval_reward"]
    assert seen[-1]["eval_scorer_reward"] < seen[best]["eval_scorer_reward"]
    assert (
        f"step {trainer.state.global_step}: stopped; the best is of step {seen[best]['step']}, in best/"
        in said
    )
    assert said.count("the policy exploits the reward model") >= 1
    assert (tmp_path / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize(("prompts", "warned"), [("abcdefgh", True), ("aaaabbbb", False)])
def test_a_fall_is_judged_by_prompts(prompts, warned):
    """Gold fell by 0.5. Eight rows of 0 and 1, the first four alike, have a standard error of 0.19. Their two
    prompts, if there are no more, have 0.5.
    """
    golds = [1.0] * 4 + [0.0] * 4
    history = [
        {"step": step, "eval_reward": reward, "eval_gold_reward": gold, "eval_kl": 1.0}
        for step, reward, gold in ((1, 0.0, 1.0), (2, 1.0, 0.5))
    ]
    table = [{"prompt": prompt, "gold_reward": gold} for prompt, gold in zip(prompts, golds, strict=True)]
    assert (overoptimization_warning(history, table, "gold_reward") is not None) is warned


def test_several_answers_to_each_prompt_are_drawn(policy, tiny_tokenizer, tmp_path):
    trainer = trainer_of(policy, tiny_tokenizer, tmp_path, eval_samples=3)
    found = trainer.evaluate()
    rows = [json.loads(line) for line in (tmp_path / "samples" / "step-000000.jsonl").open(encoding="utf-8")]
    assert [row["prompt"] for row in rows] == PROMPTS["prompt"][:] * 3
    assert len({row["answer"] for row in rows if row["prompt"] == "Hello."}) == 3
    assert found["eval_reward"] == pytest.approx(sum(row["reward"] for row in rows) / 12)
    once = trainer_of(policy, tiny_tokenizer, tmp_path / "once")
    once.evaluate()
    assert [
        json.loads(line)
        for line in (tmp_path / "once" / "samples" / "step-000000.jsonl").open(encoding="utf-8")
    ] == rows[:4]


def test_without_patience_it_goes_on_to_the_end(policy, tiny_tokenizer, tmp_path):
    trainer = watched(policy, tiny_tokenizer, tmp_path, patience=None, num_rollouts=30)
    trainer.train()
    assert trainer.state.global_step == 60


def test_stopped_and_resumed_it_stops_where_it_stopped(tiny_gpt2, tiny_tokenizer, tmp_path):
    ends = []
    for _ in range(2):  # the second goes on from a checkpoint of the first, which has stopped
        policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
        trainer = watched(policy, tiny_tokenizer, tmp_path, patience=3, save_strategy="steps", save_steps=6)
        trainer.train(resume_from_checkpoint=any(tmp_path.glob("checkpoint-*")))
        ends.append(
            (trainer.state.global_step, [entry["eval_scorer_reward"] for entry in evaluations(trainer)])
        )
    assert ends[0] == ends[1]


def test_the_stage_takes_a_reward_model_that_looks_on(tiny_records, tiny_gpt2, tmp_path, capsys):
    common = {"runs": str(tmp_path), "records": str(tiny_records)}
    short = {"max_steps": 1, "per_device_train_batch_size": 4}
    first, second = (
        str(
            reward.run(
                config.RewardStage(
                    run=name, model=str(tiny_gpt2), max_length=64, seed=seed, training=short, **common
                )
            )
        )
        for seed, name in enumerate("ab")
    )
    training = {
        "num_rollouts": 2,
        "per_device_train_batch_size": 4,
        "response_tokens": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    given = {"run": "t", "policy": str(tiny_gpt2), "reward": first, "training": training} | common
    folder = ppo.run(config.PPOStage(evaluation={"scorer": second}, **given))
    entries = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    assert all("eval_scorer_reward" in entry for entry in entries if "eval_reward" in entry)
    assert f"{second}: loaded beside the policy: the policy is trained in full" in capsys.readouterr().out

    copied = tmp_path / "copy"
    (tmp_path / "a" / "reward").rename(copied)  # what is trained on, under another name
    with pytest.raises(UserError, match=r"evaluation\.scorer is a copy of what PPO is trained on"):
        ppo.run(
            config.PPOStage(
                **given | {"reward": str(copied), "evaluation": {"scorer": _copy(copied, tmp_path / "again")}}
            )
        )


def _copy(source, target):
    import shutil

    return str(shutil.copytree(source, target))


def test_kl_and_values_do_not_depend_on_how_many_responses_are_read_together(
    policy, tiny_tokenizer, tmp_path, monkeypatch
):
    trainer = trainer_of(policy, tiny_tokenizer, tmp_path)
    with torch.no_grad():
        policy.lm_head.weight.add_(0.1 * torch.randn(policy.lm_head.weight.shape))
    responses = trainer.sample(PROMPTS, [0, 1, 2], 0, [0, 1, 2])
    reads = []
    monkeypatch.setattr(trainer.actor, "forward", count_rows(reads, trainer.actor.forward))
    kl, values = kl_and_values(trainer.actor, responses, 1.0, 8)
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 2 * 8 * policy.config.vocab_size)
    parts, values_of_parts = kl_and_values(trainer.actor, responses, 1.0, 8)
    assert reads == [3, 2, 1]
    assert parts == pytest.approx(kl, abs=1e-5)
    assert any(abs(value) > 1e-3 for value in kl)
    assert values_of_parts == [pytest.approx(row, abs=1e-5) for row in values]
    assert [len(row) for row in values] == responses.response_mask.sum(1).tolist()

    rows = response_kl(trainer.actor.policy, trainer.actor.reference, responses, 1.0)
    assert rows == pytest.approx(kl, abs=1e-5)


def count_rows(reads, forward):
    def read(query_ids, *tensors, **options):
        reads.append(len(query_ids))
        return forward(query_ids, *tensors, **options)

    return read
