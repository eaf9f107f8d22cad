"""Items -> kept or faulty: what no model should learn from gets a `Fault`, whose reason is counted.

Reasons within a record: `not-text`, `not-unicode`, `empty-text`, `not-one-answer`, `identical-answers`, `not-a-rank`, `rank-count`,
`too-few-answers`, `all-tied`, `not-a-number`, `not-finite`, `unknown-label`. Between records: `contradiction` (all of them go) and
`duplicate` (the first stays). The readers add `unreadable-line` and `not-a-dialogue`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from pipeline.config import Source
from pipeline.data.readers import ParsedRecord, RowError, canonical_text
from pipeline.data.schema import KINDS, Record
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

MESSAGE_ROLES = ("system", "user", "assistant", "tool")

BOOLS = {"false": 0, "true": 1}

WHOLE = re.compile(r"-?[0-9]+")

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # what the readers make of bytes that are not UTF-8


def validate_records(items: list[ParsedRecord], classes: list[str]) -> None:
    """Bring every record into its final columns and types, or set the `fault` of its item; `classes` names those of `labels`, in order."""
    for item in progress_bar("checking", "rows", items):
        if not item.fault:
            try:
                item.record = clean_record(item.kind, item.record, classes)
            except RowError as fault:
                item.fault = fault
    _find_contradictions([item for item in items if not item.fault])
    _find_duplicates([item for item in items if not item.fault])


def class_names(sources: list[Source], items: list[ParsedRecord]) -> list[str]:
    """The classes of `labels`: those that a source names, else the distinct labels found, sorted. Raises `UserError`."""
    given = {tuple(source.classes) for source in sources if source.classes}
    if len(given) > 1:
        raise UserError(
            f"sources name different classes: {' and '.join(map(str, sorted(given)))}; all labels share one list"
        )
    if given:
        return list(given.pop())
    found = {_label_name(item.record.get("label")) for item in items if item.kind == "labels"} - {""}
    by_number = sorted(found, key=lambda name: (int(name) if WHOLE.fullmatch(name) else math.inf, name))
    return list(BOOLS) if found <= BOOLS.keys() else by_number


def ordered_pairs(record: Record) -> list[tuple[Any, Any]]:
    """(better, worse) for every strictly ordered pair of a ranking."""
    answers = list(zip(record["ranks"], record["responses"], strict=True))
    return [(better, worse) for rank, better in answers for other, worse in answers if rank < other]


def record_identity(kind: str, record: Record) -> Hashable:
    """What duplicates share: everything but margin, source and the order in which ranked answers are listed."""
    if kind == "rankings":
        answers = zip(record["ranks"], map(canonical_text, record["responses"]), strict=True)
        return kind, canonical_text(record["prompt"]), tuple(sorted(answers))
    return kind, *(canonical_text(record[field]) for field in KINDS[kind].columns)


# Within a record


def clean_record(kind: str, record: Record, classes: list[str]) -> Record:
    """The record with its own columns only, each in its type; an optional one that says nothing is left out. Raises `Fault`."""
    cleaned: Record = {}
    schema = KINDS[kind]
    for field in (*schema.columns, *schema.optional):
        parse: Callable[..., Any] = (
            _optional_text if field == "prompt" and schema.prompt_may_be_empty else _PARSERS[field]
        )
        try:
            cleaned[field] = (
                parse(record.get(field), classes) if field == "label" else parse(record.get(field))
            )
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
        raise RowError("too-few-answers", f"expected two or more, found {len(responses)}")
    if len(set(ranks)) == 1:
        raise RowError("all-tied", f"every answer has rank {ranks[0]}")
    if any(canonical_text(better) == canonical_text(worse) for better, worse in ordered_pairs(record)):
        raise RowError("identical-answers", "the same answer has two ranks")


def _text(value: Any) -> str | list[Record]:
    """A string, or a list of messages of which role and content are kept."""
    if isinstance(value, list) and value:
        return [_message(message) for message in value]
    if not isinstance(value, str) and value != []:
        raise RowError("not-text", f"expected text or messages, found {type(value).__name__}")
    if not value or not value.strip():
        raise RowError("empty-text", "is empty or blank")
    if LONE_SURROGATE.search(value):
        raise RowError("not-unicode", "holds bytes that are not UTF-8")
    return value


def _message(value: Any) -> Record:
    if (
        not isinstance(value, dict)
        or value.get("role") not in MESSAGE_ROLES
        or not isinstance(value.get("content"), str)
    ):
        raise RowError("not-text", f"a message needs a role ({', '.join(MESSAGE_ROLES)}) and text as content")
    return {"role": value["role"], "content": _text(value["content"])}


def _response(value: Any) -> str | list[Record]:
    """A string or one assistant message."""
    answer = _text(value)
    if isinstance(answer, list) and [message["role"] for message in answer] != ["assistant"]:
        roles = ", ".join(message["role"] for message in answer)
        raise RowError(
            "not-one-answer",
            f"expected one assistant message, found {roles}; whole conversations are format: dialogues",
        )
    return answer


def _optional_text(value: Any) -> str | list[Record]:
    return (
        "" if value is None or value == [] or (isinstance(value, str) and not value.strip()) else _text(value)
    )


def _parse_each(parse: Callable[[Any], Any], reason: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(reason, f"expected a list, found {type(value).__name__}")
    return [parse(part) for part in value]


def _number(value: Any) -> float:
    """A finite number, which from CSV comes as text."""
    try:
        number = float("a bool" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise RowError("not-a-number", f"found {_preview(value)}") from None
    if not math.isfinite(number):
        raise RowError("not-finite", f"found {_preview(value)}")
    return number


def _rank(value: Any) -> int:
    try:
        rank = _number(value)
    except RowError:
        rank = 0
    if not 1 <= rank < 2**31 or rank != int(rank):
        raise RowError("not-a-rank", f"expected whole numbers from 1, the best, up; found {_preview(value)}")
    return int(rank)


def _margin(value: Any) -> float | None:
    return None if value in (None, "") else _number(value)


def _origin(value: Any) -> Any:
    return None if value is None or not str(value).strip() else _text(str(value))


def _label_name(value: Any) -> str:
    """A label as the name of a class: True, "True" and "true" are one, so are 1, 1.0 and "1"; empty where it cannot be one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value).strip() if isinstance(value, str | int) else ""
    return name.lower() if name.lower() in BOOLS else name


def _label(value: Any, classes: list[str]) -> int:
    """The index of the class that a name, an index or a bool stands for."""
    name = _label_name(value)
    index = (
        classes.index(name)
        if name in classes
        else BOOLS.get(name, int(name) if name.isdecimal() else len(classes))
    )
    if index >= len(classes):
        raise RowError("unknown-label", f"expected one of {', '.join(classes)}; found {_preview(value)}")
    return index


def _preview(value: Any) -> str:
    return repr(value)[:80]


_PARSERS: dict[str, Callable[..., Any]] = {
    "prompt": _text,
    "completion": _response,
    "chosen": _response,
    "rejected": _response,
    "response": _response,
    "responses": partial(_parse_each, _response, "not-text"),
    "ranks": partial(_parse_each, _rank, "not-a-rank"),
    "label": _label,
    "rating": _number,
    "margin": _margin,
    "source": _origin,
}


# Between records


def _find_contradictions(items: list[ParsedRecord]) -> None:
    judged: dict[Hashable, dict[Hashable, ParsedRecord]] = defaultdict(dict)
    for item in items:
        for thing, judgement in _judgements(item):
            judged[thing].setdefault(judgement, item)
    for item in items:
        others = (
            other
            for thing, mine in _judgements(item)
            for judgement, other in judged[thing].items()
            if judgement != mine
        )
        if other := next(others, None):
            item.fault = RowError("contradiction", f"{_place(other)} says otherwise")


def _judgements(item: ParsedRecord) -> list[tuple[Hashable, Hashable]]:
    """(what is judged, the judgement): two judgements of one thing contradict each other."""
    record, prompt = item.record, canonical_text(item.record["prompt"])
    match item.kind:
        case "labels" | "ratings":
            return [((item.kind, prompt, canonical_text(record["completion"])), record[item.kind[:-1]])]
        case "comparisons":
            pairs = [(record["chosen"], record["rejected"])]
        case "rankings":
            pairs = ordered_pairs(record)
        case _:
            return []
    winners = [(canonical_text(better), canonical_text(worse)) for better, worse in pairs]
    return [((item.kind, prompt, *sorted(pair)), pair[0]) for pair in winners]


def _find_duplicates(items: list[ParsedRecord]) -> None:
    first: dict[Hashable, ParsedRecord] = {}
    for item in items:
        earlier = first.setdefault(record_identity(item.kind, item.record), item)
        if earlier is not item:
            item.fault = RowError("duplicate", f"the same as {_place(earlier)}")


def _place(item: ParsedRecord) -> str:
    return f"{item.rows[0].source}:{item.rows[0].line}"
