"""Derive the kinds of records that no source has. Imports no torch.

Comparisons come from rankings, demonstrations from chosen and best-ranked responses, prompts from all kinds.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.data.readers import digest
from pipeline.data.schema import Record, is_tie
from pipeline.data.shelf import Shelf
from pipeline.data.validation import ordered_pairs, record_identity

MAX_PAIRS = 10_000  # of one ranking, as 141 responses have; those of 1,000 would be half a million


def derive_kinds(records: dict[str, Sequence[Record]], folder: Path) -> dict[str, Sequence[Record]]:
    """Return the kinds that no source has, derived from the others; each record once.

    They are in temporary files of `folder`.
    """
    comparisons, rankings = records.get("comparisons", []), records.get("rankings", [])
    cut: list[int] = []
    chosen = (
        {"prompt": record["prompt"], "completion": _first_message(record["chosen"])}
        for record in comparisons
        if not is_tie(record)
    )
    best = (
        {"prompt": ranking["prompt"], "completion": _first_message(response)}
        for ranking in rankings
        for response in _best_responses(ranking)
    )
    prompts: Iterator[Record] = (
        {name: record[name] for name in ("prompt", "answer") if name in record}
        for part in records.values()
        for record in part
        if record["prompt"]
    )
    candidates: dict[str, Iterable[Record]] = {
        "comparisons": (pair for ranking in rankings for pair in _pairs(ranking, cut)),
        "demonstrations": chain(chosen, best),
        "prompts": prompts,
    }
    derived = {
        kind: _drop_duplicates(kind, repeated, folder)
        for kind, repeated in candidates.items()
        if kind not in records
    }
    if cut:
        print(f"  of {len(cut):,} rankings an even selection of pairs is kept, at most {MAX_PAIRS:,} of each")
    return {kind: distinct for kind, distinct in derived.items() if distinct}


def _pairs(ranking: Record, cut: list[int]) -> Iterator[Record]:
    """Yield the ordered pairs of a ranking as comparisons; of more than `MAX_PAIRS` an even selection.

    The number of pairs of such a ranking is appended to `cut`.
    """
    pairs = list(ordered_pairs(ranking))
    if len(pairs) > MAX_PAIRS:
        cut.append(len(pairs))
    for better, worse in pairs[:: max(1, -(-len(pairs) // MAX_PAIRS))]:
        yield {"prompt": ranking["prompt"], "chosen": better, "rejected": worse}


def _first_message(response: Any) -> Any:
    """Return what responds to the prompt: of the rest of a conversation, its first message."""
    return response[:1] if isinstance(response, list) else response


def _best_responses(ranking: Record) -> list[Any]:
    best = min(ranking["ranks"])
    return [
        response
        for response, rank in zip(ranking["responses"], ranking["ranks"], strict=True)
        if rank == best
    ]


def _drop_duplicates(kind: str, records: Iterable[Record], folder: Path) -> Shelf:
    kept, seen = Shelf(folder), set()
    for record in records:
        identity = digest(record_identity(kind, record))
        if identity not in seen:
            seen.add(identity)
            kept.append(record)
    return kept
