"""Merge the judgements of several annotators into one record. Imports no torch.

Rows that judge the same thing are votes on it: two responses to a prompt (comparisons), or one response
(labels and ratings). The first row's record gets what they say together, and the others are `merged`.

- Comparisons: `chosen` is the response with more votes, `preference` its share of the votes.
- Labels: `label` is the class with the most votes, `label_shares` the share of each class.
- Ratings: `rating` is the mean.

`votes` is the number of votes; a row may stand for several. A vote without a winner has the preference ½. It
is a `tie`, and so are votes that have no winner together.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from math import isclose
from typing import Literal

from pipeline.data.identity import canonical_text
from pipeline.data.readers import ParsedRecord, digest
from pipeline.data.schema import MERGED, Record, RowError, is_tie, location, shares_of

Ties = Literal["drop", "keep"]


def merge_votes(items: Sequence[ParsedRecord], ties: Ties, classes: int) -> None:
    """Merge the votes among the items, whose records are clean, and set the faults of the others.

    `drop` quarantines each tie, and `keep` counts it as half a vote for each side. `classes` is the number
    of those that labels have.
    """
    groups: dict[Hashable, list[ParsedRecord]] = defaultdict(list)
    for item in items:
        if item.kind in MERGERS and not _drop_tie(item, ties):
            groups[item.kind, _subject(item.record)].append(item)
    for group in groups.values():
        if len(group) > 1:
            # The record stays in the split that is held out, if files named the splits of some rows.
            group.sort(key=lambda item: len(item.splits))
            _merge_group(group, ties, classes)


def _drop_tie(item: ParsedRecord, ties: Ties) -> bool:
    if ties == "drop" and item.kind == "comparisons" and is_tie(item.record):
        item.fault = RowError("tie", "the preference is 0.5; ties: keep trains on it")
    return bool(item.fault)


def _subject(record: Record) -> Hashable:
    """Return what votes are on: the prompt, and the responses in any order."""
    names = ("completion",) if "completion" in record else ("chosen", "rejected")
    responses = sorted(digest(canonical_text(record[name])) for name in names)
    return digest(canonical_text(record["prompt"])), *responses


def _merge_group(group: list[ParsedRecord], ties: Ties, classes: int) -> None:
    first, *others = group
    records = [item.record for item in group]
    votes = [record.get("votes", 1) for record in records]
    merged, is_tied = MERGERS[first.kind](records, votes, classes)
    if is_tied and ties == "drop":
        for item in group:
            item.fault = RowError("tie", f"{sum(votes)} votes have no winner; ties: keep trains on them")
        return
    record = records[0] | merged | {"votes": sum(votes)}
    first.record = {name: value for name, value in record.items() if value is not None}
    for item in others:
        item.fault = RowError(MERGED, f"with {location(first.rows)}")


def _merge_comparisons(records: list[Record], votes: list[int], _: int) -> tuple[Record, bool]:
    sides = [(record["chosen"], record["rejected"]) for record in records]
    first = canonical_text(sides[0][0])
    agrees = [canonical_text(chosen) == first for chosen, _ in sides]
    shares = [record.get("preference", 1.0) for record in records]
    share = _mean([s if same else 1 - s for s, same in zip(shares, agrees, strict=True)], votes)

    is_tied, has_won = isclose(share, 0.5), share >= 0.5 or isclose(share, 0.5)
    merged: Record = {"preference": 0.5 if is_tied else max(share, 1 - share)}
    winner = agrees.index(has_won)
    merged |= {"chosen": sides[winner][0], "rejected": sides[winner][1]}
    margins = [
        (record["margin"], count)
        for record, count, same in zip(records, votes, agrees, strict=True)
        if same == has_won and "margin" in record
    ]
    return merged | {"margin": _mean(*zip(*margins, strict=True)) if margins else None}, is_tied


def _merge_labels(records: list[Record], votes: list[int], classes: int) -> tuple[Record, bool]:
    rows = [shares_of(record, classes) for record in records]
    shares = [_mean(column, votes) for column in zip(*rows, strict=True)]
    winners = [label for label, share in enumerate(shares) if isclose(share, max(shares))]
    label = next((record["label"] for record in records if record["label"] in winners), winners[0])
    return {"label": label, "label_shares": shares}, len(winners) > 1


def _merge_ratings(records: list[Record], votes: list[int], _: int) -> tuple[Record, bool]:
    return {"rating": _mean([record["rating"] for record in records], votes)}, False


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


# Each returns the merged columns, of which None removes one, and whether the votes have no winner.
MERGERS: dict[str, Callable[[list[Record], list[int], int], tuple[Record, bool]]] = {
    "comparisons": _merge_comparisons,
    "labels": _merge_labels,
    "ratings": _merge_ratings,
}
