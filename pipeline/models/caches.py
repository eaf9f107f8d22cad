"""Rows leave and join the key-value cache of a batch.

Public names of transformers alone are used: `Cache.reorder_cache`, `Cache.layers`, and `keys` and `values` of
a layer, which are (rows, heads, columns, size).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def is_plain(cache: Any) -> bool:
    """Return whether a cache has the keys and values of all columns of its rows, and nothing else.

    Such rows can be moved to other columns, because their positions are in the keys. A sliding window has
    lost columns, and a recurrent state has none.
    """
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def select_rows(cache: Any, rows: Tensor) -> None:
    """Keep these rows of a cache, in this order. States of other kinds than keys and values are kept too."""
    cache.reorder_cache(rows)


def drop_columns(cache: Any, columns: int) -> None:
    """Remove the first columns of a plain cache."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., columns:, :], layer.values[..., columns:, :]


def join_rows(cache: Any, other: Any) -> None:
    """Append the rows of `other` to a cache, both plain; the narrower gets columns of zeros on its left."""
    for layer, more in zip(cache.layers, other.layers, strict=True):
        layer.keys = _stack(layer.keys, more.keys)
        layer.values = _stack(layer.values, more.values)


def _stack(first: Tensor, second: Tensor) -> Tensor:
    width = max(first.shape[-2], second.shape[-2])
    padded = [
        torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0)) for states in (first, second)
    ]
    return torch.cat(padded)
