"""Tiny random models of any architecture of transformers, whose outputs depend on all that they read."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
}


def make_model(auto: Any, architecture: str, **options: Any) -> Any:
    """Return a model in `eval()` mode; `auto` is the class of transformers that builds it."""
    sizes = dict(SIZES)
    if architecture == "xlnet":  # refuses a limit
        del sizes["max_position_embeddings"]
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(architecture, **sizes | options))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.25)
    return model.eval()
