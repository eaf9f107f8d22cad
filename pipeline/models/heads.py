"""The modules that a classifier has on top of the pretrained model: they are trained in full, unquantized."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

# Names of heads, also of those inside the trunk, such as BERT's pooler, and of language models.
HEAD_NAMES = [
    "score",
    "classifier",
    "pre_classifier",
    "pooler",
    "classification_head",
    "logits_proj",
    "sequence_summary",
    "lm_head",
]
UNQUANTIZED = [rf"(.*\.)?{name}" for name in HEAD_NAMES]  # patterns for a head at any depth of the model


def head_module_names(model: nn.Module) -> list[str]:
    """Return the last name components of a classifier's modules that no pretrained model has.

    They are those of `HEAD_NAMES` that it has, and its modules beside the trunk.
    """
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    known = [head for head in HEAD_NAMES if head in names]
    return known + [name for name in _beside_trunk(model) if name not in known]


def unquantized_patterns(model: nn.Module) -> list[str]:
    """Return patterns for the names of the modules that stay unquantized."""
    return UNQUANTIZED + [f"^{name}" for name in _beside_trunk(model) if name not in HEAD_NAMES]


def find_unquantized(source: str, auto_class: Any, **options: Any) -> list[str]:
    """Return the `unquantized_patterns` of the classifier that a checkpoint makes; no weights are read.

    `auto_class` is the class of transformers that makes it. `options` go to `AutoConfig.from_pretrained`.
    """
    config = AutoConfig.from_pretrained(source, **options)
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=options.get("trust_remote_code", False))
    return unquantized_patterns(model)


def _beside_trunk(model: Any) -> list[str]:
    """Return the names of the children of a classifier that have weights, without its trunk."""
    trunk = getattr(model, "base_model_prefix", "")
    if not hasattr(model, "num_labels") or not hasattr(model, trunk):
        return []
    children = model.named_children()
    return [name for name, child in children if name != trunk and any(True for _ in child.parameters())]
