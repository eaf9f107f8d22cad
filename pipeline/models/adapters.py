"""LoRA adapters: which ones can be used, how one is put on a model, and how one is merged into its base."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel

from pipeline.artifacts import hub
from pipeline.config import BASE_FREE_INITS, nearest
from pipeline.errors import UserError
from pipeline.models.load_errors import explain_adapter_errors, explain_load_errors

# Arguments of LoRA with which no stage trains -> the reason.
UNSUPPORTED = {
    "bias": "PEFT keeps trained biases of the base for one adapter only",
    "lora_bias": "PEFT cannot merge such an adapter",
    "layer_replication": "PEFT cannot merge an adapter of replicated layers",
    "alora_invocation_tokens": "PEFT cannot merge such an adapter",
    "arrow_config": "a router has no adapter to train",
}

# Names that PEFT itself adds to the modules_to_save of a classifier, which has one of them.
PEFT_HEADS = ("classifier", "score")


def is_adapter(source: str | Path, revision: str | None = None) -> bool:
    """Return whether a folder or hub repository contains an adapter instead of a whole model."""
    return hub.fetch_file(str(source), CONFIG_NAME, revision) is not None


def read_adapter(
    source: str, revision: str | None, task: TaskType | None, what: str, *, trained: bool = False
) -> LoraConfig:
    """Read the config of an adapter that is a `what`, such as "policy".

    Raises `UserError` if it is not LoRA, is of another task than `task` (None is any), names no base, or
    computes something else once it is loaded again. With `trained`, also if it has a setting with which no
    stage trains.
    """
    with explain_load_errors(source, "LoRA adapter"):
        adapter = PeftConfig.from_pretrained(source, revision=revision)
    if not isinstance(adapter, LoraConfig):
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        raise UserError(
            f"{source}: is an adapter of PEFT's type {kind}; "
            f"a {what} is a whole model or a LoRA adapter: merge it into its base with PEFT, or use LoRA"
        )
    if task is not None and adapter.task_type not in (None, task):
        raise UserError(
            f"{source}: is an adapter of task {adapter.task_type}; a {what} needs one of {task.value}"
        )
    if not adapter.base_model_name_or_path:
        raise UserError(f"{source}: its adapter_config.json names no base; set base_model_name_or_path in it")
    problem = unsupported_setting(adapter) if trained else _irreproducible(adapter)
    if problem:
        raise UserError(f"{source}: its adapter has {problem}; merge it into its base with PEFT")
    return adapter


def unsupported_setting(lora: LoraConfig) -> str | None:
    """Return the setting of an adapter with which no stage trains, and the reason; None if it has none."""
    default = LoraConfig()
    for name, reason in UNSUPPORTED.items():
        if (value := getattr(lora, name)) != getattr(default, name):
            return f"{name}={value}: {reason}"
    return _irreproducible(lora)


def _irreproducible(lora: LoraConfig) -> str | None:
    if "_niter_" in str(lora.init_lora_weights):
        return (
            f"init_lora_weights={lora.init_lora_weights}: its decomposition of the base is random, "
            "and PEFT repeats it when it loads the adapter"
        )
    return None


def modified_base(lora: LoraConfig) -> str | None:
    """Return the setting with which PEFT changes the weights of the base below an adapter, or None."""
    if lora.init_lora_weights not in BASE_FREE_INITS:
        return f"init_lora_weights={lora.init_lora_weights}"
    return None if lora.kasa_config is None else f"kasa_config={lora.kasa_config}"


def add_adapter(model: Any, lora: LoraConfig, where: str = "lora") -> PeftModel:
    """Put a new adapter on a model. Raises `UserError`, which begins with `where`, if PEFT refuses it."""
    check_modules(model, lora, where)
    with explain_adapter_errors(where, lora):
        return get_peft_model(model, lora)


def check_modules(model: torch.nn.Module, lora: LoraConfig | None, where: str = "lora") -> None:
    """Raise `UserError` if the adapter names modules that the model lacks; PEFT ignores such a name."""
    if lora is None:
        return
    paths = [name for name, _ in model.named_modules()]
    known = {name.rsplit(".", 1)[-1] for name in paths}
    added = PEFT_HEADS if lora.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else ()
    for key in ("target_modules", "modules_to_save"):
        names = getattr(lora, key)
        for name in sorted(names) if isinstance(names, list | set | tuple) else []:
            if name not in added and not any(path == name or path.endswith(f".{name}") for path in paths):
                raise UserError(
                    f"{where}.{key}: the model has no module {name!r}{nearest(name, known)}; name others"
                    + (", or try lora.target_modules=all-linear" if key == "target_modules" else "")
                )


def merge_into_base(model: PeftModel) -> PreTrainedModel:
    """Merge an adapter into its base, in the precision of the base."""
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    if config.tie_word_embeddings and any(hasattr(layer, "base_layer") for layer in embeddings):
        # An adapter on one of two tied embeddings changes that one alone, so they are untied first.
        output = getattr(embeddings[1], "base_layer", embeddings[1])
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        config.tie_word_embeddings = False
    merged: Any = model.merge_and_unload()
    return merged


def load_and_merge(
    base: PreTrainedModel, source: str, adapter: LoraConfig, revision: str | None
) -> PreTrainedModel:
    """Load the adapter of `source` on its base and merge it; what was trainable of the base is so again.

    The merged model's name is `source`, where its weights come from.
    """
    frozen = {name for name, parameter in base.named_parameters() if not parameter.requires_grad}
    with explain_load_errors(source, "LoRA adapter"):
        model = PeftModel.from_pretrained(base, source, config=adapter, revision=revision)
        merged = merge_into_base(model)
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(name not in frozen)
    merged.name_or_path = merged.config._name_or_path = source
    return merged
