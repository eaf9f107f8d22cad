"""Validate parsed records: a record that no model should learn from gets a `RowError`. Imports no torch.

Reasons within a record: `not-text`, `not-unicode`, `empty-text`, `not-one-answer`, `identical-answers`,
`not-a-rank`, `rank-count`, `too-few-answers`, `all-tied`, `not-a-number`, `not-finite`, `unknown-label`.
Reasons between records: `contradiction` (all of them go) and `duplicate` (the first stays).
The readers add `unreadable-line`, `unreadable-value`, `repeated-key`, `repeated-header` and `not-a-dialogue`;
the splits add `held-out`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

from pipeline.config import Source
from pipeline.data.readers import ParsedRecord, canonical_text, digest
from pipeline.data.schema import KINDS, Record, RowError
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

MESSAGE_ROLES = ("system", "user", "assistant", "tool")
BOOLEANS = {"false": 0, "true": 1}
INTEGER = re.compile(r"-?[0-9]+")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # the readers put one for each byte that is not UTF-8


def validate_records(items: list[ParsedRecord], classes: list[str]) -> None:
    """Bring each record into its final columns and types, or set the `fault` of its item.

    `classes` names the classes of `labels`, in the order of their indices.
    """
    clean_records(items, classes)
    compare_records(items)


def clean_records(items: list[ParsedRecord], classes: list[str]) -> None:
    """Validate each record by itself, as `validate_records` does."""
    for item in progress_bar("checking", "rows", items):
        if not item.fault:
            try:
                item.record = clean_record(item.kind, item.record, classes)
            except RowError as error:
                item.fault = RowError(
                    error.reason, error.detail
                )  # without the frames that a raised one holds


def compare_records(items: list[ParsedRecord]) -> None:
    """Set the faults of records that contradict or repeat another, as `validate_records` does."""
    _mark_contradictions([item for item in items if not item.fault])
    _mark_duplicates([item for item in items if not item.fault])


def class_names(sources: list[Source], items: list[ParsedRecord]) -> list[str]:
    """Return the classes of `labels`: those that a source names, else the distinct labels found, sorted.

    Raises `UserError` if two sources name different classes.
    """
    configured = {tuple(source.classes) for source in sources if source.classes}
    if len(configured) > 1:
        raise UserError(
            f"sources name different classes: {' and '.join(map(str, sorted(configured)))}; "
            "all labels share one list"
        )
    if configured:
        return list(configured.pop())

    labels = {_label_name(item.record.get("label")) for item in items if item.kind == "labels"} - {""}
    if labels <= BOOLEANS.keys():
        return list(BOOLEANS)
    return sorted(labels, key=lambda name: (int(name) if INTEGER.fullmatch(name) else math.inf, name))


def ordered_pairs(record: Record) -> list[tuple[Any, Any]]:
    """Return (better, worse) for every strictly ordered pair of responses in a ranking."""
    ranked = list(zip(record["ranks"], record["responses"], strict=True))
    return [(better, worse) for rank, better in ranked for other, worse in ranked if rank < other]


def record_identity(kind: str, record: Record) -> Hashable:
    """Return what duplicates share: all columns but margin, source and the order of ranked responses."""
    if kind == "rankings":
        ranked = zip(record["ranks"], map(canonical_text, record["responses"]), strict=True)
        return kind, canonical_text(record["prompt"]), tuple(sorted(ranked))
    return kind, *(canonical_text(record[field]) for field in KINDS[kind].columns)


# Within a record


def clean_record(kind: str, record: Record, classes: list[str]) -> Record:
    """Return the record with the columns of its kind only, each in its type.

    Empty optional columns are left out. Raises `RowError` if a value is unusable.
    """
    schema = KINDS[kind]
    cleaned: Record = {}
    for field in (*schema.columns, *schema.optional):
        parse = _PARSERS[field]
        if field == "prompt" and schema.prompt_may_be_empty:
            parse = _parse_optional_text
        elif field == "label":
            parse = partial(_parse_label, classes=classes)
        try:
            cleaned[field] = parse(record.get(field))
        except RowError as fault:
            raise RowError(fault.reason, f"{field}: {fault.detail}") from None

    cleaned = {field: value for field, value in cleaned.items() if value is not None}
    if kind == "comparisons" and canonical_text(cleaned["chosen"]) == canonical_text(cleaned["rejected"]):
        raise RowError("identical-answers", "chosen and rejected are the same")
    if kind == "rankings":
        _check_ranking(cleaned)
    return cleaned


def _check_ranking(record: Record) -> None:
    responses, ranks = record["responses"], record["ranks"]
    if len(responses) != len(ranks):
        raise RowError("rank-count", f"{len(responses)} responses, {len(ranks)} ranks")
    if len(responses) < 2:
        raise RowError("too-few-answers", f"expected two or more responses, found {len(responses)}")
    if len(set(ranks)) == 1:
        raise RowError("all-tied", f"every response has rank {ranks[0]}")
    rank_of: dict[str, int] = {}
    texts = map(canonical_text, responses)
    if any(rank_of.setdefault(text, rank) != rank for text, rank in zip(texts, ranks, strict=True)):
        raise RowError("identical-answers", "the same response has two ranks")


def _parse_text(value: Any) -> str | list[Record]:
    """Return a string, or a list of messages reduced to role and content."""
    if isinstance(value, list) and value:
        return [_parse_message(message) for message in value]
    if not isinstance(value, str) and value != []:
        raise RowError("not-text", f"expected text or messages, found {type(value).__name__}")
    if not value or not value.strip():
        raise RowError("empty-text", "is empty or blank")
    if LONE_SURROGATE.search(value):
        raise RowError("not-unicode", "contains bytes that are not UTF-8")
    return value


def _parse_message(value: Any) -> Record:
    is_message = (
        isinstance(value, dict)
        and value.get("role") in MESSAGE_ROLES
        and isinstance(value.get("content"), str)
    )
    if not is_message:
        raise RowError("not-text", f"a message needs a role ({', '.join(MESSAGE_ROLES)}) and text as content")
    return {"role": value["role"], "content": _parse_text(value["content"])}


def _parse_response(value: Any) -> str | list[Record]:
    """Return a string or a list of one assistant message."""
    response = _parse_text(value)
    if isinstance(response, list) and [message["role"] for message in response] != ["assistant"]:
        roles = ", ".join(message["role"] for message in response)
        raise RowError(
            "not-one-answer",
            f"expected one assistant message, found {roles}; whole conversations are format: dialogues",
        )
    return response


def _parse_optional_text(value: Any) -> str | list[Record]:
    is_empty = value is None or value == [] or (isinstance(value, str) and not value.strip())
    return "" if is_empty else _parse_text(value)


def _parse_each(parse: Callable[[Any], Any], reason: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(reason, f"expected a list, found {type(value).__name__}")
    return [parse(item) for item in value]


def _parse_number(value: Any) -> float:
    """Return a finite number; CSV has it as text."""
    try:
        number = float("a bool" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise RowError("not-a-number", f"found {_preview(value)}") from None
    if not math.isfinite(number):
        raise RowError("not-finite", f"found {_preview(value)}")
    return number


def _parse_rank(value: Any) -> int:
    try:
        rank = _parse_number(value)
    except RowError:
        rank = 0
    if not 1 <= rank < 2**31 or rank != int(rank):
        raise RowError(
            "not-a-rank", f"expected whole numbers from 1 (the best) upwards; found {_preview(value)}"
        )
    return int(rank)


def _parse_margin(value: Any) -> float | None:
    return None if value in (None, "") else _parse_number(value)


def _parse_origin(value: Any) -> Any:
    return None if value is None or not str(value).strip() else _parse_text(str(value))


def _label_name(value: Any) -> str:
    """Return a label as the name of a class, or "" if it cannot be one.

    True, "True" and "true" are the same name, and so are 1, 1.0 and "1".
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip() if isinstance(value, str | int) else ""
    return name.lower() if name.lower() in BOOLEANS else name


def _parse_label(value: Any, classes: list[str]) -> int:
    """Return the index of the class that a name, an index or a boolean refers to."""
    name = _label_name(value)
    if name in classes:
        return classes.index(name)

    index = BOOLEANS.get(name, int(name) if name.isdecimal() else len(classes))
    if index >= len(classes):
        raise RowError("unknown-label", f"expected one of {', '.join(classes)}; found {_preview(value)}")
    return index


def _preview(value: Any) -> str:
    return repr(value)[:80]


_PARSERS: dict[str, Callable[..., Any]] = {
    "prompt": _parse_text,
    "completion": _parse_response,
    "chosen": _parse_response,
    "rejected": _parse_response,
    "response": _parse_response,
    "responses": partial(_parse_each, _parse_response, "not-text"),
    "ranks": partial(_parse_each, _parse_rank, "not-a-rank"),
    "label": _parse_label,
    "rating": _parse_number,
    "margin": _parse_margin,
    "source": _parse_origin,
}


# Between records


def _mark_contradictions(items: list[ParsedRecord]) -> None:
    rankings: dict[Hashable, list[ParsedRecord]] = defaultdict(list)
    others = []
    for item in items:
        if item.kind == "rankings":
            rankings[digest(canonical_text(item.record["prompt"]))].append(item)
        else:
            others.append(item)

    # Only rankings of one prompt can contradict each other. A ranking of K responses has K² judgements, so
    # those of different prompts are not held together.
    for group in (others, *(group for group in rankings.values() if len(group) > 1)):
        _mark_contradictions_within(group)


def _mark_contradictions_within(items: list[ParsedRecord]) -> None:
    first: dict[bytes, tuple[Hashable, ParsedRecord]] = {}
    opposing: dict[bytes, ParsedRecord] = {}
    for item in items:
        for subject, verdict in _judgements(item):
            if first.setdefault(subject, (verdict, item))[0] != verdict:
                opposing.setdefault(subject, item)

    for item in items if opposing else ():
        for subject, verdict in _judgements(item):
            if subject in opposing:
                earlier_verdict, earlier = first[subject]
                other = opposing[subject] if verdict == earlier_verdict else earlier
                item.fault = RowError("contradiction", f"{_location(other)} disagrees")
                break


def _judgements(item: ParsedRecord) -> Iterator[tuple[bytes, Hashable]]:
    """Yield (digest of a subject, verdict); two verdicts on one subject contradict each other."""
    record, prompt = item.record, canonical_text(item.record["prompt"])
    match item.kind:
        case "labels" | "ratings":
            yield digest((prompt, canonical_text(record["completion"]), item.kind)), record[item.kind[:-1]]
            return
        case "comparisons":
            pairs = [(canonical_text(record["chosen"]), canonical_text(record["rejected"]))]
        case "rankings":
            pairs = ordered_pairs(record | {"responses": [*map(canonical_text, record["responses"])]})
        case _:
            return

    for better, worse in pairs:
        yield digest((prompt, *sorted((better, worse)))), better < worse


def _mark_duplicates(items: list[ParsedRecord]) -> None:
    first: dict[bytes, ParsedRecord] = {}
    for item in items:
        earlier = first.setdefault(digest(record_identity(item.kind, item.record)), item)
        if earlier is not item:
            item.fault = RowError("duplicate", f"the same as {_location(earlier)}")


def _location(item: ParsedRecord) -> str:
    return f"{item.rows[0].source}:{item.rows[0].line}"
