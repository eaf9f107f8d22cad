"""Check what a program passes to `PPOTrainer`, before anything is computed."""

from pathlib import Path
from typing import Any, get_args

from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn

from pipeline.artifacts.schema import CRITIC
from pipeline.data.reward_columns import check_names
from pipeline.errors import UserError
from pipeline.models.adapters import modified_base, unsupported_setting
from pipeline.ppo.backbone_compat import modifies_base
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.critic import Critic, Place, critic_lora
from pipeline.reward.coercion import REWARDS


def check_arguments(
    policy: Any, reward: Any, args: Any, processing_class: Any, functions: dict[str, Any]
) -> None:
    """Raise `UserError` if an argument is of another kind than `PPOTrainer` takes, before one is loaded.

    `functions` are the optional rewards by name.
    """
    is_policy = isinstance(policy, str | Path | nn.Module)
    _expect("policy", policy, is_policy, "a causal language model, its path or its hub id")
    _expect("reward", reward, reward is not None, REWARDS)
    _expect("args", args, isinstance(args, PPOConfig), "a PPOConfig")
    for name in ("eos_token_id", "pad_token_id"):
        has_token = processing_class is None or getattr(processing_class, name, None) is not None
        _expect("processing_class", processing_class, has_token, f"the policy's tokenizer, with its {name}")
    for name, function in functions.items():
        _expect(name, function, function is None or callable(function), "a reward function, or None")


def check_critic(critic: Any, policy: Any, args: PPOConfig, tokenizer: Any) -> None:
    """Raise `UserError` if the critic is no `Critic`, or cannot be trained beside the policy."""
    _expect("critic", critic, isinstance(critic, Critic), "a pipeline.Critic")
    if critic.on not in get_args(Place):
        raise UserError(f"ppo: critic.on: expected {' or '.join(get_args(Place))}, found {critic.on!r}")
    if args.value_init == "reward" and (critic.on != "trunk" or critic.value_head is not None):
        raise UserError(
            "ppo: value_init: reward gives the value head on the policy's trunk the reward model's weights, "
            "but the critic has a source or a trunk of its own; use value_init: zero"
        )
    if critic.on == "model":
        _expect("critic.model", critic.model, isinstance(critic.model, nn.Module), "a language model")
        rows = critic.model.get_input_embeddings().weight.shape[0]
        if rows < len(tokenizer):
            raise UserError(
                f"ppo: critic: its model reads {rows} token ids, and the policy's tokenizer has "
                f"{len(tokenizer)}; expected a model of the same vocabulary"
            )
    elif critic.on == "adapter":
        if not isinstance(policy, PeftModel):
            raise UserError(
                "ppo: critic.on: adapter needs a policy that is trained with LoRA; add a 'lora:' section, or "
                "set critic.on: model"
            )
        if CRITIC in policy.peft_config:
            raise UserError(f"ppo: policy: has an adapter named {CRITIC!r} already; give it another name")
        check_shared_base(policy.peft_config[str(policy.active_adapter)], critic_lora(policy, critic))


def check_shared_base(policy: Any, critic: Any) -> None:
    """Raise `UserError` if the adapter of the policy or the critic cannot share its base with the other."""
    for owner, lora in (("the policy's", policy), ("the critic's", critic)):
        if setting := modifies_base(lora):
            raise UserError(
                f"ppo: critic.on: adapter: {owner} adapter has {setting}, which an adapter on a shared base "
                "cannot have; set critic.on: model"
            )


def check_launch(critic: Critic, accelerator: Accelerator) -> None:
    """Raise `UserError` if the launch checkpoints layers itself, without the adapter of their forward."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if critic.on == "adapter" and getattr(plugin, "activation_checkpointing", False):
        raise UserError(
            "ppo: fsdp_activation_checkpointing: true computes a layer again with whichever adapter is "
            "active by then, so critic.on: adapter would get wrong gradients; set it to false, and "
            "training.gradient_checkpointing: true"
        )


def check_datasets(args: PPOConfig, train_dataset: Any, eval_dataset: Any, demonstrations: Any) -> None:
    """Raise `UserError` if a dataset of `PPOTrainer` has no rows, or a wrong column."""
    prompts = {"train_dataset": train_dataset}
    prompts |= {} if eval_dataset is None else {"eval_dataset": eval_dataset}
    for name, rows in prompts.items():
        _check_rows(name, rows, "prompt")
        check_names(f"ppo: {name}", rows.column_names, "rename or remove it")
    if args.ptx_coef and not demonstrations:
        raise UserError(
            f"ppo: ptx_coef={args.ptx_coef:g} needs demonstrations to learn from, and there are none"
        )
    if args.ptx_coef:
        _check_rows("demonstrations", demonstrations, "prompt", "completion")


def warn_of_biased_penalty(args: PPOConfig) -> None:
    """Print, in one process, that k2 and k3 as a reward have another gradient than the KL.

    See "A Comedy of Estimators" (arXiv:2512.21852), arXiv:2510.01555, and `tests/ppo/test_credit.py`.
    """
    if args.kl_estimator != "k1" and args.kl_coef and args.process_index == 0:
        print(
            f"  kl_estimator: {args.kl_estimator} is a biased penalty: inside the reward its gradient is not "
            "that of the KL, and near the reference it hardly pulls back; k1's is the KL's",
            flush=True,
        )


def _check_rows(name: str, rows: Any, *columns: str) -> None:
    """Raise `UserError` unless the argument `name` is a dataset with at least one row and these columns."""
    _expect(name, rows, isinstance(rows, Dataset), "a datasets.Dataset, a list of dicts, a path or a name")
    if not len(rows):
        raise UserError(f"ppo: {name}: has no rows; expected at least one")
    for column in columns:
        if column not in rows.column_names:
            raise UserError(f"ppo: {name}: has no column {column!r}; found {', '.join(rows.column_names)}")


def check_adapters(policy: PeftModel) -> None:
    """Raise `UserError` if an adapter of the policy is not LoRA, or changes its base."""
    for name, adapter in policy.peft_config.items():
        if not isinstance(adapter, LoraConfig):
            kind = type(adapter).__name__
            raise UserError(f"ppo: policy: its adapter {name!r} has a {kind}; expected a LoraConfig")
        if setting := unsupported_setting(adapter) or modified_base(adapter):
            raise UserError(
                f"ppo: policy: its adapter {name!r} has {setting}; PPO needs one that leaves its base as it "
                "is: merge it first, or initialize another one"
            )


def _expect(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        kind = "None" if value is None else f"a {type(value).__name__}"
        raise UserError(f"ppo: {name}: expected {expected}, found {kind}")
