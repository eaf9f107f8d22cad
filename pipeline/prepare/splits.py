"""Records -> train, validation, test: by prompt, over all kinds at once, so that no test prompt of one kind trains another."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.data.readers import canonical_text

SPLITS = ("train", "validation", "test")


def split_key(record: Mapping[str, Any]) -> str:
    """What must stay on one side: the prompt; where that is empty, the completion."""
    return canonical_text(record["prompt"] or record["completion"])


def assign_splits(groups: Iterable[str], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """{group: split}. `fractions` holds `validation` and `test`, each in [0, 1); the rest is `train`.

    The order is that of sha256(seed, group), so it depends neither on the order of the rows nor on other sources' names. Sizes are the
    rounded fractions, at least one group each where there are three or more, and `train` is never empty.
    """
    ordered = sorted(set(groups), key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    least = 1 if len(ordered) >= 3 else 0
    sizes = {
        split: max(least, round(len(ordered) * fractions[split])) if fractions[split] else 0
        for split in SPLITS[1:]
    }
    while ordered and sum(sizes.values()) >= len(ordered):
        sizes[max(sizes, key=lambda split: sizes[split])] -= 1
    held_out = [split for split in SPLITS[1:] for _ in range(sizes[split])]
    return dict(zip(ordered, held_out + ["train"] * (len(ordered) - len(held_out)), strict=True))
