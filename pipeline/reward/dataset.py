"""Records -> what the trainer learns from: the ids of each record's answers, and what was said of them.

Out, a row for each record: `ids` (K lists), `answer` (K: where the answer begins in them), `target` (K ranks, a class index or a rating),
`margin` where a record has one, `length` (all tokens). What does not fit is cut or dropped, and counted.
"""

import math
from collections import Counter

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.data.schema import KINDS, Record
from pipeline.errors import UserError
from pipeline.reward.encoding import Encoding, encode_response


def tokenize_records(
    data: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, how: Encoding, drop: bool
) -> tuple[Dataset, dict[str, int]]:
    """(rows, counts by what happened to those that did not fit). `drop` leaves overlong ones out.

    Two answers that were told apart by rank and are the same once cut teach nothing true: their record is left out.
    """
    counts: Counter[str] = Counter()
    rows = []
    for number, record in enumerate(data):
        row, fate = _tokenize_record(record, kind, tokenizer, how, number)
        if fate == "cut" and drop:
            fate = "dropped"
        counts[fate] += 1
        if fate in ("whole", "cut"):
            rows.append(row)
    return Dataset.from_list(rows), {
        name: counts[name] for name in ("cut", "dropped", "alike once cut") if counts[name]
    }


def _tokenize_record(
    record: Record, kind: str, tokenizer: PreTrainedTokenizerBase, how: Encoding, number: int
) -> tuple[Record, str]:
    """(row, its fate: whole, cut, or alike once cut)."""
    schema = KINDS[kind]
    assert schema.responses, f"{kind} train no reward model"
    assert schema.target, f"{kind} train no reward model"
    encoded = [
        encode_response(tokenizer, how, record["prompt"], answer) for answer in schema.responses(record)
    ]
    target = schema.target(record)
    row = {
        "ids": [each.ids for each in encoded],
        "answer": [each.answer for each in encoded],
        "target": target,
    }
    row["length"] = sum(map(len, row["ids"]))
    figures = {"margin": 0.0 if record["margin"] is None else record["margin"]} if "margin" in record else {}
    for name, value in (figures | ({"rating": target} if kind == "ratings" else {})).items():
        if value is None or not math.isfinite(value):
            raise UserError(
                f"{kind}: row {number}: {name} is {value}, expected a finite number; one such row would ruin the model"
            )
    if isinstance(target, list) and (len(target) != len(encoded) or min(target, default=0) < 1):
        raise UserError(
            f"{kind}: row {number}: ranks are {target} for {len(encoded)} answers; expected one for each, 1 the best"
        )
    overlong = any(each.overlong for each in encoded)
    told_apart = len(set(target)) > 1 if isinstance(target, list) else False
    alike = overlong and told_apart and len(set(map(tuple, row["ids"]))) == 1
    return row | figures, "alike once cut" if alike else "cut" if overlong else "whole"
