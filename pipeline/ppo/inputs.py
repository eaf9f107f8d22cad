"""Turn what a program passes to `PPOTrainer` into what it trains: arguments, policy and tokenizer.

`pipeline.data.coercion` does the same for the datasets, and `pipeline.reward.coercion` for the rewards.
Everything raises one `UserError` for a wrong input.
"""

import copy
import inspect
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from pipeline.data.coercion import coerce_rows
from pipeline.distributed.sharding import disable_zero3_init
from pipeline.errors import UserError
from pipeline.models.adapters import add_adapter
from pipeline.models.generation_config import make_savable
from pipeline.models.load_errors import explain_load_errors
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.models.probing import unwrap
from pipeline.models.templates import settle_template
from pipeline.ppo.actor_critic import REFERENCE
from pipeline.ppo.arguments import check_adapters, check_datasets, check_trainer_arguments
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.trl_names import TRAINER_NAMES
from pipeline.training.reserved import suggest_name


def check_keywords(cls: type[Trainer], kwargs: dict[str, Any]) -> None:
    """Raise `UserError` for a keyword argument that nothing reads, or that is of another kind."""
    known = {name for owner in (cls, Trainer) for name in inspect.signature(owner).parameters}
    for name in kwargs:
        if name in TRAINER_NAMES or name not in known:
            hint = suggest_name(name, known - TRAINER_NAMES.keys(), TRAINER_NAMES)
            raise UserError(f"ppo: {cls.__name__} has no {name!r}{hint}")
    check_trainer_arguments(**kwargs)


def choose_one(name: str, value: Any, other_name: str, other: Any) -> Any:
    """Return the argument that was passed under one of its two names. Raises `UserError` if both were."""
    if value is not None and other is not None:
        raise UserError(f"ppo: {name} and {other_name} are one argument; pass one of them")
    return other if value is None else value


def default_arguments(policy: Any) -> PPOConfig:
    """Return the default arguments, with an output folder that is named after the policy, as in TRL."""
    source = str(policy) if isinstance(policy, str | Path) else str(getattr(policy, "name_or_path", ""))
    return PPOConfig("-".join(filter(None, (Path(source).name, "PPO"))))


def prepare_datasets(
    args: PPOConfig, train_dataset: Any, eval_dataset: Any, demonstrations: Any
) -> tuple[Any, Any, Any]:
    """Return the three datasets, of which the last two may be None, checked for rows and columns."""
    data = (
        coerce_rows("ppo: train_dataset", train_dataset, ["train"]),
        coerce_rows("ppo: eval_dataset", eval_dataset, ["validation", "test"]),
        coerce_rows("ppo: demonstrations", demonstrations, ["train"]),
    )
    check_datasets(args, *data)
    return data


def prepare_policy(
    policy: Any, tokenizer: PreTrainedTokenizerBase | None, lora: LoraConfig | None, args: PPOConfig
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the policy and its tokenizer, loaded in fp32 if the policy is a path or a hub id.

    A tokenizer that is not passed is that of the folder or hub id of the policy. `lora` is put on the policy
    as a new adapter, after `args.seed` is set. Raises `UserError` if a part cannot be loaded or used.
    """
    source = str(policy if isinstance(policy, str | Path) else getattr(policy, "name_or_path", ""))
    if tokenizer is None:
        if not source:
            raise UserError(
                "ppo: processing_class: the policy was not loaded from a folder or the hub, so its tokenizer "
                "is unknown; pass processing_class"
            )
        # The vocabulary of a model that is in memory does not grow by a pad token.
        tokenizer = load_tokenizer(source, distinct_pad=not isinstance(policy, nn.Module))
    elif not tokenizer.chat_template:
        settle_template(tokenizer, source or "processing_class", "\n")
    if isinstance(policy, str | Path):
        disable_zero3_init(args)
        policy = load_policy(source, tokenizer, trainable=lora is None)
        if isinstance(policy, PeftModel) and lora is None:
            add_reference(policy, source)
    if lora is not None:
        policy = _add_adapter(policy, lora, args.seed)
    if isinstance(policy, PeftModel):
        check_adapters(policy)
    make_savable(unwrap(policy))
    return policy, tokenizer


def add_reference(policy: PeftModel, source: str, revision: str | None = None) -> None:
    """Load the adapter of `source` into the policy again, as the frozen reference of the one it trains."""
    with explain_load_errors(source, "LoRA adapter"):
        policy.load_adapter(source, adapter_name=REFERENCE, revision=revision)
    policy.set_adapter("default")


def _add_adapter(policy: Any, lora: Any, seed: int) -> PeftModel:
    if not isinstance(lora, LoraConfig):
        raise UserError(f"ppo: peft_config: expected a peft.LoraConfig, found a {type(lora).__name__}")
    if isinstance(policy, PeftModel):
        raise UserError(
            "ppo: peft_config: the policy has an adapter already; remove peft_config to train that one "
            "further, or merge it into its base first"
        )
    lora = copy.deepcopy(lora)  # PEFT writes into it
    lora.task_type = lora.task_type or TaskType.CAUSAL_LM
    set_seed(seed)
    return add_adapter(policy, lora, "ppo: peft_config")
