"""Split records by prompt, over all kinds at once, so that a test prompt of one kind trains no other."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.data.identity import canonical_text, question
from pipeline.data.schema import SPLITS


def split_key(record: Mapping[str, Any]) -> str:
    """Return what must stay in one split: the prompt or, if that is empty, the completion.

    Prompts that a reader cannot tell apart, or that differ in their system turns only, have one key.
    """
    return question(record["prompt"] or record["completion"])


def assign_records(
    records: Iterable[Mapping[str, Any]], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Return {split key: split}, as `assign_splits` does.

    The name of a group is the first of its prompts in alphabetical order.
    """
    names: dict[str, str] = {}
    for record in records:
        key, name = split_key(record), canonical_text(record["prompt"] or record["completion"])
        names[key] = min(name, names.get(key, name))
    split_of = assign_splits(names.values(), fractions, seed)
    return {key: split_of[name] for key, name in names.items()}


def assign_splits(groups: Iterable[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Return {group: split}; `fractions` has `validation` and `test`, each in [0, 1), the rest is `train`.

    Groups are ordered by sha256(seed, group), so neither the order of the rows nor the names of other sources
    matter. Sizes are the rounded fractions. With three groups or more, each split with a positive fraction
    gets at least one group. `train` is never empty.
    """
    ordered = sorted(set(groups), key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    minimum = 1 if len(ordered) >= 3 else 0
    sizes = {
        split: max(minimum, round(len(ordered) * fractions[split])) if fractions[split] else 0
        for split in SPLITS[1:]
    }
    while ordered and sum(sizes.values()) >= len(ordered):
        sizes[max(sizes, key=lambda split: sizes[split])] -= 1

    held_out = [split for split in SPLITS[1:] for _ in range(sizes[split])]
    return dict(zip(ordered, held_out + ["train"] * (len(ordered) - len(held_out)), strict=True))
