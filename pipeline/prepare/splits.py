"""Split records by prompt, over all kinds at once, so that a test prompt of one kind trains no other."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.data.identity import question
from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import SPLITS, RowError


def split_key(record: Mapping[str, Any]) -> str:
    """Return what must stay in one split: the prompt or, if that is empty, the completion.

    Prompts that a reader cannot tell apart, or that differ in their system turns only, have one key.
    """
    return question(record["prompt"] or record["completion"])


def split_group(record: Mapping[str, Any], seed: int) -> bytes:
    """Return 32 bytes for the `split_key` of a record; `seed` decides their order, which is random."""
    return hashlib.sha256(f"{seed}\0{split_key(record)}".encode()).digest()


def narrow_splits(items: Iterable[ParsedRecord], seed: int) -> dict[bytes, tuple[str, ...]]:
    """Return {group: the splits that all of its items may go to}.

    If a prompt is in two splits by the names of their files, it stays in the one that is held out (in test,
    if both are), and the other item gets the fault `held-out`.
    """
    narrow: dict[bytes, tuple[str, ...]] = {}
    order = [("test",), ("validation",)]
    for item in sorted(items, key=lambda item: order.index(item.splits) if item.splits in order else 2):
        group = split_group(item.record, seed)
        allowed = narrow.get(group, SPLITS)
        both = tuple(split for split in allowed if split in item.splits)
        if both:
            narrow[group] = both
        else:
            item.fault = RowError("held-out", f"its prompt is in a file that is held out for {allowed[0]}")
    return narrow


def assign_splits(
    groups: Mapping[bytes, tuple[str, ...]], fractions: Mapping[str, float]
) -> dict[bytes, str]:
    """Return {group: split}; `groups` has the splits that each may go to.

    `fractions` has `validation` and `test`, each in [0, 1); the rest is `train`. It applies to the groups
    that may go to the same splits. They are ordered by their bytes, so neither the order of the rows nor the
    names of other sources matter. Sizes are the rounded fractions. With three such groups or more, each split
    with a positive fraction gets at least one. `train` is never empty if a group may go there.
    """
    pools: dict[tuple[str, ...], list[bytes]] = defaultdict(list)
    for group, allowed in groups.items():
        pools[allowed].append(group)
    return {
        group: split
        for allowed, pool in pools.items()
        for group, split in _assign_pool(sorted(pool), allowed, fractions)
    }


def _assign_pool(
    ordered: list[bytes], allowed: tuple[str, ...], fractions: Mapping[str, float]
) -> Iterable[tuple[bytes, str]]:
    if len(allowed) == 1:
        return ((group, allowed[0]) for group in ordered)

    minimum = 1 if len(ordered) >= 3 else 0
    sizes = {
        split: max(minimum, round(len(ordered) * fractions[split])) if fractions[split] else 0
        for split in allowed
        if split != "train"
    }
    while sum(sizes.values()) >= len(ordered):
        sizes[max(sizes, key=lambda split: sizes[split])] -= 1
    held_out = [split for split in sizes for _ in range(sizes[split])]
    return zip(ordered, held_out + ["train"] * (len(ordered) - len(held_out)), strict=True)
