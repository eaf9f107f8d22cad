"""The policy that a stage starts from: a whole model, an adapter to continue, or one to merge first."""

import logging
from typing import Any

from peft import LoraConfig, TaskType
from transformers import PreTrainedTokenizerBase

from pipeline.config import PolicyStage
from pipeline.errors import UserError
from pipeline.models.adapters import is_adapter, read_adapter
from pipeline.models.loading import load_merged_policy, load_policy
from pipeline.training.arguments import build_lora_config, load_options

logger = logging.getLogger(__name__)

SIZES = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")  # of an adapter, which cannot change


def continued_adapter(config: PolicyStage, source: str, revision: str | None = None) -> LoraConfig | None:
    """Return the config of the adapter that the stage trains further, or None if it starts from weights.

    Raises `UserError` if the adapter cannot be trained, or if the stage has no `lora:` section.
    """
    if not is_adapter(source, revision) or config.adapter == "merge":
        return None
    if config.lora is None:
        raise UserError(
            f"{source}: is a LoRA adapter, but {config.stage} has no 'lora:' section; "
            "set lora: {} to train it further, or adapter: merge to train all weights of the merged model"
        )
    adapter = read_adapter(source, revision, TaskType.CAUSAL_LM, "policy", trained=True)
    adapter.inference_mode = False
    return adapter


def load_start(
    config: PolicyStage, source: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> tuple[Any, LoraConfig | None]:
    """Load the policy that a stage starts from; return it and the new adapter to put on it.

    The adapter is None if all weights are trained, or if the policy is an adapter that is trained further.
    Raises `UserError` if the policy cannot be loaded or trained.
    """
    options = load_options(config, revision)
    if adapter := continued_adapter(config, source, revision):
        _warn_of_unread(config, source, adapter)
        return load_policy(source, tokenizer, trainable=True, **options), None
    load = load_merged_policy if is_adapter(source, revision) else load_policy
    return load(source, tokenizer, **options), build_lora_config(config, TaskType.CAUSAL_LM, revision)


def _warn_of_unread(config: PolicyStage, source: str, adapter: LoraConfig) -> None:
    lora = config.lora or {}
    unread = [
        f"lora.{key}={lora[key]} (it has {getattr(adapter, key)})"
        for key in SIZES
        if key in lora and lora[key] != getattr(adapter, key)
    ]
    if unread:
        logger.warning(
            "%s: is an adapter, which %s trains further; not read: %s; adapter: merge trains a new one",
            source,
            config.stage,
            ", ".join(unread),
        )
