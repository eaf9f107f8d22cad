"""Keys that nothing reads, or that break what a stage promises, are refused with the reason."""

import dataclasses
import re
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl import RewardConfig, SFTConfig

from pipeline import config
from pipeline.errors import UserError
from pipeline.ppo import stage as ppo
from pipeline.ppo import trl_trainers
from pipeline.ppo.config import UNSUPPORTED as NOT_FOR_PPO
from pipeline.ppo.config import PPOConfig
from pipeline.reward import stage as reward
from pipeline.sft import stage as sft
from pipeline.training.arguments import require_batch
from pipeline.training.reserved import UNSUPPORTED, check_reserved, default_of

STAGES: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "sft": (sft, config.SFTStage, {"model": "a"}),
    "reward": (reward, config.RewardStage, {"model": "a"}),
    "ppo": (ppo, config.PPOStage, {"reward": "math:sqrt"}),
    "rloo": (ppo, config.PPOStage, {"reward": "math:sqrt", "algorithm": "rloo"}),
}


def refused(name: str, **training: Any) -> str:
    module, cls, common = STAGES[name]
    with pytest.raises(UserError) as error:
        module.check(cls(run="x", training=training, **common))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "training", "reason"),
    [
        ("sft", {"save_only_model": True}, "could not resume from its checkpoints"),
        ("reward", {"ignore_data_skip": True}, "would train on other rows"),
        ("ppo", {"auto_find_batch_size": True}, "set per_device_train_batch_size"),
        ("rloo", {"deepspeed": {"zero_optimization": {"stage": 2}}}, "accelerate launch --config_file"),
        ("sft", {"fsdp": "full_shard"}, "accelerate launch --config_file"),
        ("sft", {"bf16_full_eval": True}, "round the weights that are published"),
        ("reward", {"prediction_loss_only": True}, "has the metrics of its stage"),
        ("sft", {"packing": True}, "grows with the square of the batch"),
        ("sft", {"padding_free": True}, "grows with the square of the batch"),
        ("sft", {"eval_packing": True}, "grows with the square of the batch"),
        ("sft", {"assistant_only_loss": True}, "only the response is learned"),
        ("sft", {"completion_only_loss": False}, "only the response is learned"),
        ("sft", {"model_init_kwargs": {"token": "secret"}}, "rows are tokenized by the stage"),
        ("sft", {"truncation_mode": "keep_end"}, "rows are cut by 'overlong'"),
        ("reward", {"pad_token": "x"}, "it would change the base's tokenizer"),
        ("reward", {"remove_unused_columns": True}, "need it to be false"),
        ("reward", {"ddp_broadcast_buffers": True}, "need it to be false"),
        ("rloo", {"use_transformers_paged": True}, "had not sampled one batch"),
        ("rloo", {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "is not for algorithm: rloo"),
        ("ppo", {"dataloader_num_workers": 2}, "batches are those of the rollout"),
        ("ppo", {"beta": 0.1}, "training.beta: PPOConfig has no such key; TRL's beta is kl_coef here"),
        ("ppo", {"num_generations": 8}, "PPOConfig has no such key; remove it: a critic replaces the group"),
        ("rloo", {"kl_coef": 0.1}, "RLOOConfig has no such key"),
        ("sft", {"hub_token": "secret"}, "rlhf push uploads an artifact"),
        ("rloo", {"hub_token": "secret"}, "rlhf push uploads an artifact"),
    ],
)
def test_a_key_is_refused_with_the_reason(name: str, training: dict[str, Any], reason: str) -> None:
    message = refused(name, **training)
    assert reason in message
    assert next(iter(training)) in message
    assert "secret" not in message


@pytest.mark.parametrize("cls", [SFTConfig, RewardConfig, PPOConfig])
def test_a_default_value_is_no_mistake(cls: type[TrainingArguments]) -> None:
    reasons = {"sft": sft.UNSUPPORTED, "reward": reward.UNSUPPORTED}.get(cls.__name__[:-6].lower(), {})
    defaults = {field.name: default_of(field) for field in dataclasses.fields(cls)}
    values = {key: defaults[key] for key in UNSUPPORTED | reasons}
    check_reserved("sft", values, cls, reasons)


@pytest.mark.parametrize(
    ("reasons", "cls"),
    [
        (UNSUPPORTED, TrainingArguments),
        (sft.UNSUPPORTED, SFTConfig),
        (reward.UNSUPPORTED, RewardConfig),
        (trl_trainers.UNSUPPORTED, trl_trainers.ARGUMENTS["rloo"]),
        (NOT_FOR_PPO, PPOConfig),
    ],
)
def test_each_refused_key_is_one_of_the_libraries(reasons: dict[str, str], cls: type) -> None:
    """Else a name that a library changes would be read again."""
    assert set(reasons) <= {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("key", NOT_FOR_PPO)
def test_the_api_of_ppo_refuses_what_the_command_line_refuses(key: str, tmp_path: Any) -> None:
    value = {bool: True, int: 5, float: 0.5}.get(type(getattr(PPOConfig, key, None)), "x")
    if key in ("average_tokens_across_devices", "eval_do_concat_batches", "dataloader_in_order"):
        value = False
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r} is not for PPO; set instead: ")):
        PPOConfig(str(tmp_path), **{key: value})
    assert key in refused("ppo", **{key: value})


def test_arguments_of_ppo_are_copied(tmp_path: Any) -> None:
    args = PPOConfig(str(tmp_path), num_rollouts=7, report_to="none", use_cpu=True)
    assert args.num_train_epochs == 7
    assert dataclasses.replace(args) == args
    with pytest.raises(ValueError, match=r"num_train_epochs=2 is not for PPO; .* num_rollouts"):
        PPOConfig(str(tmp_path), num_train_epochs=2)


def test_a_batch_that_would_be_dropped_is_refused(tmp_path: Any) -> None:
    rows = Dataset.from_dict({"a": [1, 2, 3]})
    sizes = {"report_to": "none", "use_cpu": True, "dataloader_drop_last": True}
    for size in (3, 4):
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=size, **sizes)
        if size <= len(rows):
            assert require_batch("rows", args, rows) is rows
        else:
            with pytest.raises(UserError, match=r"rows: has 3 rows, and .* drops a batch of fewer than 4"):
                require_batch("rows", args, rows)
