"""Records to training rows: token ids of each record's responses, and their target.

Each row has these columns:

- `ids`: K lists of token ids.
- `response_start`: K indices, where the response begins in each list.
- `target`: K ranks, a class index or a rating.
- `margin`: if the record has one.
- `length`: the number of all tokens.

Rows that do not fit are cut or dropped, and counted.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import KINDS, Record
from pipeline.errors import UserError, explain_row
from pipeline.reward.encoding import Encoded, Encoding, encode_response

COUNTED = ("cut", "dropped", "alike once cut")  # outcomes that are reported, in this order


def tokenize_records(
    data: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, drop: bool
) -> tuple[Dataset, dict[str, int]]:
    """Return the rows, and the counts of those that did not fit by outcome.

    `drop` omits overlong records. A record is also omitted if its responses have different ranks but are
    equal once cut: their order would be a wrong label. Raises `UserError` if a number or the ranks of a
    record are invalid.
    """
    counts: Counter[str] = Counter()
    rows = []
    for number, record in enumerate(data):
        with explain_row(f"{kind}: row {number}"):
            row, outcome = _tokenize_record(record, kind, tokenizer, encoding)
        if outcome == "cut" and drop:
            outcome = "dropped"
        counts[outcome] += 1
        if outcome in ("whole", "cut"):
            rows.append(row)
    return Dataset.from_list(rows), {name: counts[name] for name in COUNTED if counts[name]}


def check_records(kind: str, records: Dataset) -> None:
    """Raise `UserError` if there are no records to train on, or if nothing can be learned from them."""
    if not len(records):
        raise UserError(f"reward: there are no {kind} to train on; give prepare a source that has them")
    schema = KINDS[kind]
    assert schema.responses, f"{kind} train no reward model"
    assert schema.target, f"{kind} train no reward model"
    require_contrast(kind, ((schema.target(record), schema.responses(record)) for record in records))


def require_contrast(kind: str, examples: Iterable[tuple[Any, Sequence[Any]]]) -> None:
    """Raise `UserError` if nothing can be learned from the examples, each a target and its responses.

    So it is if all labels or ratings are equal, or if no record has different responses of different rank.
    """
    first, count = None, 0
    for target, responses in examples:
        count += 1
        if isinstance(target, list):
            if len(set(target)) > 1 and any(response != responses[0] for response in responses):
                return
        elif count == 1:
            first = target
        elif target != first:
            return
    problems = {
        "labels": "have one class",
        "ratings": "are equal",
        "comparisons": "compare a response with itself",
        "rankings": "rank no response above another one",
    }
    if count:
        raise UserError(
            f"reward: all {count:,} {kind} to train on {problems[kind]}, which teaches nothing; "
            "give prepare other records"
        )


def _tokenize_record(
    record: Record, kind: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> tuple[Record, str]:
    """Return the row and its outcome: whole, cut, or alike once cut."""
    schema = KINDS[kind]
    assert schema.responses, f"{kind} train no reward model"
    assert schema.target, f"{kind} train no reward model"
    encoded = [
        encode_response(tokenizer, encoding, record["prompt"], response)
        for response in schema.responses(record)
    ]
    row = {
        "ids": [each.ids for each in encoded],
        "response_start": [each.response_start for each in encoded],
        "target": schema.target(record),
    }
    row["length"] = sum(map(len, row["ids"]))
    if "margin" in record:
        row["margin"] = 0.0 if record["margin"] is None else record["margin"]

    _check_row(row, kind)
    return row, _outcome(encoded, row["target"])


def _check_row(row: Record, kind: str) -> None:
    """Check that margin and rating are finite, and that there is one rank for each response."""
    target = row["target"]
    numbers = {"margin": row["margin"]} if "margin" in row else {}
    if kind == "ratings":
        numbers["rating"] = target
    for name, value in numbers.items():
        if value is None or not math.isfinite(value):
            raise UserError(f"{name} is {value}, expected a finite number; one such row would ruin the model")
    responses = len(row["ids"])
    if isinstance(target, list) and (len(target) != responses or min(target, default=0) < 1):
        raise UserError(f"ranks are {target} for {responses} responses; expected one for each, 1 the best")


def _outcome(encoded: list[Encoded], target: object) -> str:
    if not any(each.overlong for each in encoded):
        return "whole"
    has_order = isinstance(target, list) and len(set(target)) > 1
    all_equal = len({tuple(each.ids) for each in encoded}) == 1
    return "alike once cut" if has_order and all_equal else "cut"
