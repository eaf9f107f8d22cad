"""Check what a program passes to `PPOTrainer`, before anything is computed."""

import math
from pathlib import Path
from typing import Any, get_args

from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainerCallback

from pipeline.artifacts.schema import CRITIC
from pipeline.config.base import Overlong
from pipeline.data.reward_columns import check_names
from pipeline.data.texts import check_count, check_text
from pipeline.errors import UserError
from pipeline.models.adapters import modified_base, unsupported_setting
from pipeline.ppo.backbone_compat import modifies_base
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.critic import Critic, Place, critic_lora
from pipeline.reward.coercion import REWARDS


def check_arguments(
    policy: Any,
    reward: Any,
    args: Any,
    processing_class: Any,
    functions: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Raise `UserError` if an argument is of another kind than `PPOTrainer` takes, before one is loaded.

    `functions` are the optional rewards by name, and `options` are other arguments.
    """
    is_model = isinstance(policy, nn.Module) and hasattr(policy, "config")
    is_policy = is_model or (isinstance(policy, str | Path) and policy != "")
    _expect("policy", policy, is_policy, "a causal language model, its path or its hub id")
    _expect("reward", reward, reward is not None and reward != "", REWARDS)
    _expect("args", args, isinstance(args, PPOConfig), "a PPOConfig")
    for name in ("eos_token_id", "pad_token_id"):
        has_token = processing_class is None or getattr(processing_class, name, None) is not None
        _expect("processing_class", processing_class, has_token, f"the policy's tokenizer, with its {name}")
    for name, function in functions.items():
        _expect(name, function, function is None or callable(function), "a reward function, or None")
    _check_options(**options)


def _check_options(keep: Any, max_prompt_tokens: Any, overlong: Any, generate: Any) -> None:
    _expect("keep", keep, isinstance(keep, bool), "True or False")
    check_count("ppo: max_prompt_tokens", max_prompt_tokens)
    if overlong not in get_args(Overlong):
        raise UserError(f"ppo: overlong={overlong!r}: expected {' or '.join(get_args(Overlong))}")
    signature = "a function with the signature of pipeline.models.generation.generate"
    _expect("generate", generate, callable(generate), signature)


def check_trainer_arguments(
    callbacks: Any = None, optimizers: Any = (None, None), optimizer_cls_and_kwargs: Any = None, **_: Any
) -> None:
    """Raise `UserError` if an argument of the Trainer that `PPOTrainer` hands on is of another kind."""
    is_list = callbacks is None or isinstance(callbacks, list)
    _expect("callbacks", callbacks, is_list, "a list of TrainerCallbacks")
    for number, callback in enumerate(callbacks or []):
        is_callback = isinstance(callback, TrainerCallback) or (
            isinstance(callback, type) and issubclass(callback, TrainerCallback)
        )
        _expect(f"callbacks[{number}]", callback, is_callback, "a TrainerCallback")

    pair = "(an optimizer or None, its scheduler or None)"
    is_pair = isinstance(optimizers, tuple | list) and len(optimizers) == 2
    _expect("optimizers", optimizers, is_pair, pair)
    for number, part in enumerate(optimizers):
        # Accelerate's stand-ins for DeepSpeed's have params and optimizer.
        is_part = part is None or any(hasattr(part, name) for name in ("step", "params", "optimizer"))
        _expect(f"optimizers[{number}]", part, is_part, pair)

    if optimizer_cls_and_kwargs is not None:
        match optimizer_cls_and_kwargs:
            case (cls, dict()) if callable(cls):
                return
        _expect(
            "optimizer_cls_and_kwargs",
            optimizer_cls_and_kwargs,
            False,
            "(the class, a dict of its arguments)",
        )


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
    _check_critic_fields(critic)
    if critic.on == "model":
        is_model = hasattr(critic.model, "get_input_embeddings")
        _expect("critic.model", critic.model, is_model, "a language model")
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


def _check_critic_fields(critic: Critic) -> None:
    for name, kind in (("lora", LoraConfig), ("weights", dict), ("value_head", dict), ("origin", dict)):
        value = getattr(critic, name)
        is_kind = value is None or isinstance(value, kind)
        _expect(f"critic.{name}", value, is_kind, f"a {kind.__name__}, or None")
    head = critic.value_head
    if head is not None and head.keys() != {"weight", "bias"}:
        found = ", ".join(map(str, head)) or "no key"
        raise UserError(f"ppo: critic.value_head: expected the keys weight and bias, found {found}")
    rate = critic.learning_rate
    is_rate = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < math.inf
    if rate is not None and not is_rate:
        raise UserError(f"ppo: critic.learning_rate={rate!r}: expected a finite number above 0, or None")


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
    if demonstrations is not None:
        _expect_dataset("demonstrations", demonstrations)
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
    """Raise `UserError` unless the argument `name` is a dataset with rows, and texts in these columns."""
    _expect_dataset(name, rows)
    if not len(rows):
        raise UserError(f"ppo: {name}: has no rows; expected at least one")
    for column in columns:
        if column not in rows.column_names:
            raise UserError(f"ppo: {name}: has no column {column!r}; found {', '.join(rows.column_names)}")
        for number, text in enumerate(rows[column]):
            check_text(f"ppo: {name}: row {number}: {column}", text)


def _expect_dataset(name: str, rows: Any) -> None:
    _expect(name, rows, isinstance(rows, Dataset), "a datasets.Dataset, a list of dicts, a path or a name")


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
