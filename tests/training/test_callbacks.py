"""What stands beside the Trainer's bar."""

from types import SimpleNamespace

import pytest
from transformers import ProgressCallback, Trainer

from pipeline.training import callbacks
from pipeline.training.callbacks import MetricsProgressBar, use_metrics_bar


@pytest.fixture
def shown(monkeypatch):
    """(a bar, what it shows), its clock moved by two seconds for each log that counts tokens."""
    figures: list[dict[str, str]] = []
    seconds = iter(range(0, 100, 2))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    made = MetricsProgressBar()
    made.training_bar = SimpleNamespace(set_postfix=figures.append)
    return made, figures


def test_tokens_per_second_are_those_since_the_last_log(shown):
    made, figures = shown
    made.on_log(None, None, None, {"loss": 0.5, "num_tokens": 100.0})
    made.on_log(None, None, None, {"eval_loss": 0.25})
    made.on_log(None, None, None, {"loss": 0.25, "num_tokens": 3100.0})
    assert figures == [{"loss": "0.500"}, {"loss": "0.250", "tokens/s": "1,500"}]


def test_a_log_may_tell_its_own_speed(shown):
    made, figures = shown
    made.on_log(
        None,
        None,
        None,
        {"loss": 0.5, "objective/raw_scores": 1.25, "objective/kl": 0.0625, "tokens_per_second": 1234.5},
    )
    assert figures == [{"loss": "0.500", "reward": "1.250", "kl": "0.062", "tokens/s": "1,234"}]


def test_it_takes_the_place_of_the_trainers_own_and_of_no_other(tiny_gpt2, tmp_path):
    from transformers import AutoModelForCausalLM, TrainingArguments

    for disable, expected in ((False, [MetricsProgressBar]), (True, [])):
        args = TrainingArguments(str(tmp_path), disable_tqdm=disable, report_to="none", use_cpu=True)
        trainer = Trainer(AutoModelForCausalLM.from_pretrained(tiny_gpt2), args)
        use_metrics_bar(trainer)
        bars = [
            type(callback)
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, ProgressCallback)
        ]
        assert bars == expected
