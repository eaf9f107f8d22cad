"""What trained stages share: the values of their sections, and what this machine can do."""

import json

import pytest
import torch
from trl import SFTConfig

from pipeline import config
from pipeline.errors import UserError
from pipeline.evaluate import stage as evaluate
from pipeline.models.patches import disable_dropout
from pipeline.ppo import stage as ppo
from pipeline.sft import stage as sft
from pipeline.training import arguments
from pipeline.training.arguments import _convert, build_arguments, resolve_precision


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (str, False, "no"),
        (bool, False, False),
        (float, "5e-5", 5e-5),
        (float | None, "none", None),
        (str | None, "none", "none"),
    ],
)
def test_yaml_values_become_what_the_field_wants(hint, value, expected):
    assert _convert(hint, value) == expected


def test_bf16_that_a_gpu_only_emulates_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision("auto") == "fp32"


def test_one_process_over_several_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SFTConfig, "n_gpu", 4)
    with pytest.raises(
        UserError, match=r"4 GPUs are visible to one process; .*'accelerate launch -m pipeline sft"
    ):
        build_arguments(config.SFTStage(run="x", model="a"), SFTConfig, tmp_path)


def test_two_precisions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(
        UserError,
        match=r"sft: precision is fp32, but accelerate launch has mixed_precision: bf16; .*'no' in its file",
    ):
        build_arguments(config.SFTStage(run="x", model="a", precision="fp32"), SFTConfig, tmp_path)


@pytest.mark.parametrize(
    ("begun", "here", "batch", "shares"),
    [
        ({}, 4, (8, 1), (8, 1)),
        ({"processes": 2}, 2, (8, 1), (8, 1)),
        ({"processes": 2}, 1, (8, 1), (8, 2)),  # 16 rows a step
        ({"processes": 2}, 4, (8, 1), (4, 1)),
        ({"processes": 1}, 3, (6, 2), (4, 1)),  # 12: four each, of at most six at a time
        ({"processes": 4}, 1, (3, 3), (3, 12)),
    ],
)
def test_a_step_keeps_its_rows_on_another_number_of_processes(
    begun, here, batch, shares, tmp_path, monkeypatch
):
    monkeypatch.setattr(arguments, "world_size", lambda: here)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if begun:
        (tmp_path / "begun.json").write_text(json.dumps(begun | {"sharded_by": "nothing"}))
    stage = config.SFTStage(run="x", model="a", training=dict(zip(names, batch, strict=True)))
    built = build_arguments(stage, SFTConfig, tmp_path)
    assert tuple(getattr(built, name) for name in names) == shares


@pytest.mark.parametrize(
    ("begun", "found"),
    [
        (
            {"processes": 2, "sharded_by": "nothing"},
            "16 rows per step, which 3 processes cannot share evenly; start a number of processes "
            "that divides 16",
        ),
        (
            {"processes": 3, "sharded_by": "FSDP"},
            "was started with weights sharded by FSDP, but this launch has weights sharded by nothing",
        ),
    ],
)
def test_what_another_launch_cannot_go_on_from_is_refused(begun, found, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "world_size", lambda: 3)
    (tmp_path / "begun.json").write_text(json.dumps(begun))
    with pytest.raises(UserError, match=found):
        build_arguments(
            config.SFTStage(run="x", model="a", training={"per_device_train_batch_size": 8}),
            SFTConfig,
            tmp_path,
        )


def test_dropout_is_off_wherever_a_model_keeps_its_probability():
    module = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.ReLU())
    module[1].dropout = module[1].attention_dropout = module[1].layerdrop = 0.1
    module[1].scale = 0.5
    disable_dropout(module)
    assert (
        module[0].p,
        module[1].dropout,
        module[1].attention_dropout,
        module[1].layerdrop,
        module[1].scale,
    ) == (0, 0, 0, 0, 0.5)


def test_what_cannot_be_quantized_here_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(arguments, "find_spec", lambda _: None)
    common = {"run": "t", "quantization": "4bit"}
    for stage, module in (
        (config.SFTStage(model="m", lora={}, **common), sft),
        (config.PPOStage(lora={}, reward="math:sqrt", **common), ppo),
        (config.EvaluateStage(**common), evaluate),
    ):
        with pytest.raises(
            UserError,
            match=f"{stage.stage}: quantization: 4bit needs bitsandbytes, which is not installed here",
        ):
            module.check(stage)


def test_evaluate_refuses_a_precision_that_is_not_there():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="precision: fp16 needs a GPU"):
            evaluate.check(config.EvaluateStage(run="t", precision="fp16"))
