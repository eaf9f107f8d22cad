"""Records to training rows: token ids of each record's responses, and their target.

Each row has these columns:

- `ids`: K lists of token ids.
- `response_start`: K indices, where the response begins in each list.
- `target`: K ranks, a class index, a rating, or 1 for each right step of one response and 0 for each wrong.
- `steps`: of a response in steps, the index of the token at which each step ends.
- `margin` and `preference`: if the record has them.
- `shares`: of a labelled response, the share of each class in the votes, if the records have them.
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
from pipeline.reward.encoding import CUT, Encoded, Encoding, encode_response
from pipeline.reward.steps import read_steps

STEP_OUTPUTS = ("wrong", "right")  # of a step, by its label
COUNTED = ("cut", "dropped", "alike once cut")  # outcomes that are reported, in this order


def tokenize_records(
    data: Dataset, kind: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, drop: bool
) -> tuple[Dataset, dict[str, int]]:
    """Return the rows, and the counts of those that did not fit by outcome.

    `drop` omits overlong records. So is a record none of whose steps remains once it is cut; a step that was
    cut is not trained on. A record is also omitted if its responses have different ranks but are
    equal once cut: their order would be a wrong label. Raises `UserError` if a number or the ranks of a
    record are invalid.
    """
    counts: Counter[str] = Counter()
    rows = []
    for number, record in enumerate(data):
        with explain_row(f"{kind}: row {number}"):
            tokenize = _tokenize_steps if kind == "steps" else _tokenize_record
            row, outcome = tokenize(record, kind, tokenizer, encoding)
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
    if kind == "steps":
        _require_two_verdicts([label for target, _ in examples for label in target])
        return
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

    if "preference" in record:
        row["preference"] = 1.0 if record["preference"] is None else record["preference"]
    if "label_shares" in record:
        row["shares"] = record["label_shares"]

    _check_row(row, kind)
    return row, _outcome(encoded, row["target"])


def _require_two_verdicts(labels: list[int]) -> None:
    if labels and len(set(labels)) == 1:
        raise UserError(
            f"reward: all {len(labels):,} steps to train on are {STEP_OUTPUTS[labels[0]]}, which teaches "
            "nothing; give prepare records with right and with wrong steps"
        )


def _tokenize_steps(
    record: Record, kind: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> tuple[Record, str]:
    """Return the row of one response in steps, and its outcome: whole, cut, or dropped if no step remains."""
    steps = record["completions"]
    _check_labels(steps, record["labels"])
    labels = list(map(int, record["labels"]))
    text, ends = read_steps(steps, encoding.step_separator)
    encoded = encode_response(tokenizer, encoding, record["prompt"], text, ends)
    kept = [i for i, position in enumerate(encoded.steps or ()) if position != CUT]
    row = {
        "ids": [encoded.ids],
        "response_start": [encoded.response_start],
        "steps": encoded.positions,
        "target": [labels[i] for i in kept],
        "length": len(encoded.ids),
    }
    return row, "dropped" if not kept else "cut" if encoded.overlong else "whole"


def _check_labels(steps: Any, labels: Any) -> None:
    """Check records that prepare did not make: there is a step, and one verdict for each."""
    if not steps:
        raise UserError("completions is empty; expected a step or more")
    if len(steps) != len(labels):
        raise UserError(f"{len(labels)} labels for {len(steps)} steps; expected one for each")
    if wrong := [label for label in labels if label not in (0, 1)]:
        raise UserError(f"a step has the label {wrong[0]!r}; expected true (right) or false (wrong)")


def _check_row(row: Record, kind: str) -> None:
    """Check that margin and rating are finite, and that there is one rank for each response."""
    target = row["target"]
    numbers = {"margin": row["margin"]} if "margin" in row else {}
    if kind == "ratings":
        numbers["rating"] = target
    if not 0 <= row.get("preference", 1.0) <= 1:  # NaN too
        raise UserError(f"preference is {row['preference']}, expected a share from 0 to 1")
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
