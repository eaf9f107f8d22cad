"""What one sees of a PPO run: the bar, the sample answers, and both in a tracker."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.models.loading import load_policy

from .test_trainer import trainer_of


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
