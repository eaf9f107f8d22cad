"""What stands beside the Trainer's bar."""

from types import SimpleNamespace

import pytest
import torch
from transformers import ProgressCallback, Trainer

from pipeline.errors import UserError
from pipeline.training import callbacks
from pipeline.training.callbacks import MetricsProgressBar, PrintProgress, StopAtNonFinite, use_metrics_bar


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


def logged(callback, disable_tqdm, entries, capsys):
    """What it prints of (step, entry) of a training of 40 steps."""
    args = SimpleNamespace(disable_tqdm=disable_tqdm)
    state = SimpleNamespace(global_step=0, max_steps=40, is_world_process_zero=True)
    callback.on_train_begin(args, state, None)
    for step, entry in entries:
        state.global_step = step
        if any(name.startswith("eval_") for name in entry):
            callback.on_evaluate(args, state, None, metrics=entry)
        else:
            callback.on_log(args, state, None, logs=entry)
    return capsys.readouterr().out.splitlines()


def test_without_a_terminal_each_tenth_of_the_steps_is_a_line(capsys):
    entries = [(step, {"loss": 1 / step, "grad_norm": 2.0}) for step in range(1, 41)]
    lines = logged(PrintProgress(), True, [*entries, (40, {"train_loss": 0.5})], capsys)
    assert len(lines) == 10
    assert lines[:2] == ["  step 4/40  loss 0.250", "  step 8/40  loss 0.125"]
    assert lines[-1] == "  step 40/40  loss 0.025"
    rollout = {"loss": 0.5, "objective/raw_scores": 1.25, "objective/kl": 0.0625, "lr": 1.0}
    assert logged(PrintProgress(), True, [(20, rollout)], capsys) == [
        "  step 20/40  loss 0.500  reward 1.250  kl 0.062"
    ]
    assert logged(PrintProgress(), False, entries, capsys) == []


def test_the_last_evaluation_is_printed_once(capsys):
    first, last = ({"eval_loss": loss, "eval_runtime": 3.0, "epoch": 1.0} for loss in (0.5, 0.25))
    again = last | {"eval_runtime": 4.0}
    lines = logged(PrintProgress(), True, [(20, first), (40, last), (40, again)], capsys)
    assert lines == ["  step 20/40  loss 0.500", "  step 40/40  loss 0.250"]


@pytest.mark.parametrize(
    ("fp16", "entry", "found"),
    [
        (False, {"loss": float("nan")}, "loss is nan"),
        (True, {"loss": float("inf")}, "loss is inf"),
        (False, {"eval_loss": float("nan")}, "eval_loss is nan"),
        (False, {"loss": 1.0, "grad_norm": float("inf")}, "grad_norm is inf"),
        (True, {"loss": 1.0, "grad_norm": float("inf")}, None),  # the loss scaler looks for a scale
        (False, {"loss": 1.0, "eval_f1": float("nan")}, None),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_stage(fp16, entry, found):
    callback, args = StopAtNonFinite("sft"), SimpleNamespace(fp16=fp16, logging_nan_inf_filter=True)
    state = SimpleNamespace(global_step=7)
    callback.on_train_begin(args, state, None)
    assert not args.logging_nan_inf_filter
    if found is None:
        callback.on_log(args, state, None, logs=entry)
        return
    with pytest.raises(UserError, match=f"sft: step 7: {found}, not finite; .*lower training.learning_rate"):
        callback.on_log(args, state, None, logs=entry)


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_uses_it():
    callback, state = StopAtNonFinite("reward"), SimpleNamespace(global_step=7)
    model = torch.nn.Linear(2, 1)
    callback.on_pre_optimizer_step(SimpleNamespace(fp16=False), state, None, model=model)  # no gradient
    model.weight.grad = torch.tensor([[1.0, float("nan")]])
    callback.on_pre_optimizer_step(SimpleNamespace(fp16=True), state, None, model=model)
    with pytest.raises(UserError, match="reward: step 8: the gradient is not finite; nothing is published"):
        callback.on_pre_optimizer_step(SimpleNamespace(fp16=False), state, None, model=model)
