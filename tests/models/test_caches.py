"""Rows leave and join a cache: the keys and values of the others stay as they are."""

from typing import Any

import torch
from transformers import DynamicCache, MambaConfig, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from pipeline.models.caches import drop_columns, is_plain, join_rows, select_rows


def make(*columns: list[float]) -> Any:
    """A cache of two layers of one head of size 1: keys by row, and values of ten times as much."""
    keys = torch.tensor(columns)[:, None, :, None]
    cache = DynamicCache()
    for layer in range(2):
        cache.update(keys + 100 * layer, 10 * (keys + 100 * layer), layer)
    return cache


def keys(cache: Any, layer: int = 0) -> Any:
    assert torch.equal(cache.layers[layer].values, 10 * cache.layers[layer].keys)
    return cache.layers[layer].keys[:, 0, :, 0].tolist()


def test_rows_leave_columns_go_and_rows_join() -> None:
    cache = make([1, 2, 3], [4, 5, 6], [7, 8, 9])
    select_rows(cache, torch.tensor([2, 0]))
    assert keys(cache) == [[7, 8, 9], [1, 2, 3]]
    drop_columns(cache, 1)
    assert keys(cache, 1) == [[108, 109], [102, 103]]
    assert cache.get_seq_length() == 2
    join_rows(cache, make([20, 21, 22]))
    assert keys(cache) == [[0, 8, 9], [0, 2, 3], [20, 21, 22]]
    join_rows(cache, make([30]))
    assert keys(cache)[-1] == [0, 0, 30]
    assert cache.get_seq_length() == 3
    updated, _ = cache.update(torch.ones(4, 1, 1, 1), torch.ones(4, 1, 1, 1), 0)
    assert updated[:, 0, :, 0].tolist()[1] == [0, 2, 3, 1]


def test_only_full_keys_and_values_are_plain() -> None:
    """If transformers gives its caches another class, rows no longer join; then this fails."""
    assert is_plain(make([1.0]))
    assert [type(layer) for layer in make([1.0]).layers] == [DynamicLayer, DynamicLayer]
    sizes = {"num_hidden_layers": 2, "hidden_size": 32}
    sliding = MistralConfig(sliding_window=4, **sizes)
    full = MistralConfig(sliding_window=None, **sizes)
    assert not is_plain(DynamicCache(config=sliding))
    assert is_plain(DynamicCache(config=full))
    assert not is_plain(DynamicCache(config=MambaConfig(**sizes)))
    assert not is_plain(StaticCache(config=full, max_cache_len=8))
    assert not is_plain(None)
