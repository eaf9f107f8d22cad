"""How many tokens a model can read."""

from typing import Any

import torch
from torch import nn

from pipeline.models.patches import full_attention_limit
from pipeline.models.probing import ask_once, explain, made_up_ids, remember

# Embeddings and buffers that have a row for each position.
POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions", "positions_embed", "pos_encoding")

# Fields of configs that name a limit. It is one only if the model has tables, or fails beyond it.
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")

# Scalings by which the position of a token depends on the longest row of its batch.
CHANGING_ROPE = ("dynamic", "longrope")

# A forward over one position too many is made if it needs at most so many products, and so many positions.
MAX_PRODUCTS, MAX_ROW = 2e9, 2048


def max_positions(model: Any) -> int | None:
    """Return how many tokens a row may have, or None if the model has no limit.

    A model on the meta device is only looked at.
    """
    return _table_limit(model) or _limit_of_forward(model)


@remember
def mixing_limit(model: Any) -> int | None:
    """Return the length up to which rows of different lengths compute what they compute alone, or None.

    Beyond it, the longest row of a batch decides the attention of all (BigBird), or the scale of their rotary
    positions (dynamic and longrope scaling).
    """
    limits = (full_attention_limit(model), _rope_limit(model.config.get_text_config()))
    return min((limit for limit in limits if limit is not None), default=None)


def _rope_limit(config: Any) -> int | None:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = [parameters, *(layer for layer in parameters.values() if isinstance(layer, dict))]
    for layer in layers:
        kind = layer.get("rope_type", layer.get("type"))
        if kind == "longrope":
            original = layer.get("original_max_position_embeddings")
            return int(original or config.original_max_position_embeddings)
        if kind in CHANGING_ROPE:
            return int(config.max_position_embeddings)
    return None


@remember
def _table_limit(model: Any) -> int | None:
    if model.config.model_type == "mpt":
        return int(model.config.max_seq_len)  # its ALiBi biases are a table of this size, built in a forward
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in POSITION_TABLES:
            # RoBERTa and its relatives count from the pad token's id on; OPT's module has an offset.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            rows = module.num_embeddings - max(skipped, getattr(module, "offset", 0))
            return min(rows, _config_limit(model.config.get_text_config()) or rows)
    for name, buffer in model.named_buffers():
        if name.rsplit(".", 1)[-1] in POSITION_TABLES and buffer.ndim == 2:
            return len(buffer)
    return None


def _config_limit(config: Any) -> int:
    return next((int(value) for name in LIMITS if (value := getattr(config, name, None))), 0)


@ask_once(default=None)
def _limit_of_forward(model: Any) -> int | None:
    """Return the limit in the config if a small model fails beyond it, and not at it; else None."""
    limit = _config_limit(model.config.get_text_config())
    weights = sum(parameter.numel() for parameter in model.parameters())
    # On a GPU, an index that is out of range would end the process.
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if not limit or not on_cpu or limit > MAX_ROW or limit * weights > MAX_PRODUCTS:
        return None
    return limit if not _reads(model, limit + 1) and _reads(model, limit) else None


def _reads(model: Any, length: int) -> bool:
    try:
        model(input_ids=torch.tensor(made_up_ids(model, length)))
    except Exception as error:
        explain(error)
        return False
    return True
