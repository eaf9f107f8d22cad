"""What one sees of a PPO run: the bar, the sample answers, and both in a tracker."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import StepRewards
from pipeline.models.loading import load_policy
from pipeline.ppo.samples import MAX_SAMPLES, token_columns

from .test_trainer import PROMPTS, evenness, trainer_of


def test_the_bar_shows_reward_and_kl_and_the_tracker_metrics_and_responses(
    tiny_gpt2, tiny_tokenizer, tmp_path, capsys
):
    policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
    trainer = trainer_of(
        policy,
        tiny_tokenizer,
        tmp_path,
        report_to="tensorboard",
        disable_tqdm=False,
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "objective/kl" in entry][-1]
    figures = (
        f"loss={last['loss']:.3f}, reward={last['objective/raw_scores']:.3f}, kl={last['objective/kl']:.3f}"
    )
    figures += f", tokens/s={last['tokens_per_second']:,.0f}]"
    assert figures in capsys.readouterr().err

    (events,) = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    assert [event.step for event in found.Scalars("train/objective/kl")] == [4, 8]
    tables = [event.tensor_proto.string_val[0].decode() for event in found.Tensors("samples/text_summary")]
    for step, table in zip((4, 8), tables, strict=True):
        rows = [
            json.loads(line)
            for line in (tmp_path / "samples" / f"step-{step:06}.jsonl").open(encoding="utf-8")
        ]
        assert [row["prompt"] for row in rows] == [
            "Tell me the capital of Italy.",
            "Name the colour of snow.",
            "Hello.",
            "I forgot the young of a cat.",
        ]
        assert table.splitlines()[0] == "| prompt | answer | reward | kl | response_tokens | ended_fraction |"
        assert [line.split(" | ")[2] for line in table.splitlines()[2:]] == [
            str(row["reward"]) for row in rows
        ]


def first_words(completions, **_):
    """1 for the first half of a response and -0.5 for the rest."""
    return [StepRewards([1.0, -0.5], [len(text) // 2, len(text)]) if text else 0.25 for text in completions]


def written(folder):
    return [json.loads(line) for line in (folder / "samples" / "step-000000.jsonl").open(encoding="utf-8")]


def test_rows_have_the_texts_rewards_and_values_of_their_tokens(tiny_gpt2, tiny_tokenizer, tmp_path):
    policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
    trainer = trainer_of(policy, tiny_tokenizer, tmp_path, reward=first_words)
    torch.nn.init.normal_(trainer.actor.value_head.weight)
    trainer.evaluate()
    rows = written(tmp_path)
    responses = trainer.sample(PROMPTS, range(4), "evaluation", range(4))
    with torch.no_grad():
        tensors = (responses.query_ids, responses.query_mask, responses.response_ids, responses.response_mask)
        values = trainer.actor(*tensors, 1.0).values
    for i, row in enumerate(rows):
        assert "".join(row["tokens"]) == row["answer"]
        assert len(row["tokens"]) == row["response_tokens"] == len(row["token_rewards"])
        (first, last) = [j for j, reward in enumerate(row["token_rewards"]) if reward]
        assert (row["token_rewards"][first], row["token_rewards"][last]) == (1.0, -0.5)
        half, text = len(row["answer"]) // 2, "".join(row["tokens"][: first + 1])
        assert len(text) - len(row["tokens"][first]) < half <= len(text)
        assert row["reward"] == 0.5
        expected = values[i, : row["response_tokens"]].tolist()
        assert row["token_values"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert len(set(row["token_values"])) > 1


def test_a_number_is_the_reward_of_the_last_token_and_other_rows_have_no_lists(
    tiny_gpt2, tiny_tokenizer, tmp_path
):
    policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
    trainer = trainer_of(policy, tiny_tokenizer, tmp_path, reward=evenness)
    row, other = trainer._evaluate_rows(PROMPTS, {}, [MAX_SAMPLES - 1, MAX_SAMPLES])
    assert row["token_rewards"] == [0.0] * (row["response_tokens"] - 1) + [row["reward"]]
    assert row.keys() - other.keys() == {"tokens", "token_rewards", "token_values"}


def test_an_end_token_has_no_text_and_without_a_critic_there_are_no_values(tiny_tokenizer):
    ids = [*tiny_tokenizer("The capital of Italy")["input_ids"], tiny_tokenizer.eos_token_id]
    columns = token_columns(tiny_tokenizer, ids, "The capital of Italy", 2.0, None)
    assert columns.keys() == {"tokens", "token_rewards"}
    assert (columns["tokens"][-1], columns["token_rewards"][-1]) == ("", 2.0)
    assert "".join(columns["tokens"]) == "The capital of Italy"
    assert token_columns(tiny_tokenizer, ids, "Another text", 2.0, None) == {}
    valued = token_columns(tiny_tokenizer, ids[:1], tiny_tokenizer.decode(ids[:1]), [0.5], [1 / 3])
    assert valued["token_values"] == [0.333333]
