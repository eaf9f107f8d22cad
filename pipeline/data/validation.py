"""Validate parsed records: a record that no model should learn from gets a `RowError`. Imports no torch.

Reasons within a record: `not-text`, `not-unicode`, `empty-text`, `not-one-answer`, `identical-answers`,
`not-a-rank`, `rank-count`, `too-few-answers`, `all-tied`, `not-a-number`, `not-finite`, `unknown-label`,
`invalid-label`, `no-steps`, `label-count`, `not-a-target`, `not-a-share`, `not-a-count`, and those of
`pipeline.data.messages` and `pipeline.data.serialized`.
Reasons between records: `merged` and `tie` (`pipeline.data.votes`), `contradiction` (all of them go) and
`duplicate` (the first stays).
The readers add `unreadable-line`, `unreadable-value`, `repeated-key`, `repeated-header` and `not-a-dialogue`;
`source.map` adds `map-failed` and `not-mapped`;
the shapes of `pipeline.data.shapes` add `wrong-shape`, `tie`, `no-winner`, `not-ranked` and `not-judged`; the
splits add `held-out`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

from pipeline.data.identity import canonical_text, is_blank, visible_identity
from pipeline.data.labels import parse_label, parse_verdict
from pipeline.data.messages import carries_nothing, is_target, preview, read_message
from pipeline.data.readers import ParsedRecord, digest
from pipeline.data.schema import KINDS, Record, RowError, location
from pipeline.data.serialized import read_list_cell, read_messages_cell
from pipeline.data.votes import Ties, merge_votes
from pipeline.distributed.progress import progress_bar

MAX_COUNT = 2**31 - 1  # of votes, and of ranks
MAX_NUMBER = 3.4028234663852886e38  # the largest that training's fp32 holds
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # the readers put one for each byte that is not UTF-8


def validate_records(items: list[ParsedRecord], classes: list[str], ties: Ties = "drop") -> None:
    """Bring each record into its final columns and types, or set the `fault` of its item.

    `classes` names the classes of `labels`, in the order of their indices. `ties` is that of `merge_votes`.
    """
    clean_records(items, classes)
    compare_records(items, classes, ties)


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


def compare_records(items: list[ParsedRecord], classes: list[str], ties: Ties) -> None:
    """Merge votes, and set the faults of records that contradict or repeat another, as `validate_records`."""
    merge_votes([item for item in items if not item.fault], ties, len(classes))
    _mark_contradictions([item for item in items if not item.fault])
    _mark_duplicates([item for item in items if not item.fault])


def ordered_pairs(record: Record) -> Iterator[tuple[Any, Any]]:
    """Yield (better, worse) for every strictly ordered pair of responses in a ranking."""
    ranked = list(zip(record["ranks"], record["responses"], strict=True))
    return ((better, worse) for rank, better in ranked for other, worse in ranked if rank < other)


def record_identity(kind: str, record: Record) -> Hashable:
    """Return what duplicates share: all columns but optional ones and the order of ranked responses.

    Of a prompt it is also what else a reward function reads, but the answer.
    """
    if kind == "rankings":
        ranked = zip(record["ranks"], map(canonical_text, record["responses"]), strict=True)
        return kind, canonical_text(record["prompt"]), tuple(sorted(ranked))
    identity = [canonical_text(record[field]) for field in KINDS[kind].columns]
    others = {
        name: value
        for name, value in _other_columns(kind, record).items()
        if value is not None and name != "answer"
    }
    return kind, *identity, *([canonical_text(others)] if others else [])


def _other_columns(kind: str, record: Record) -> Record:
    """Return the columns for reward functions, if the kind keeps them."""
    schema = KINDS[kind]
    return {
        name: value for name, value in record.items() if schema.keeps_columns and name not in schema.columns
    }


# Within a record


def clean_record(kind: str, record: Record, classes: list[str]) -> Record:
    """Return the record with the columns of its kind, each in its type, and those it keeps as they are.

    Empty optional columns are left out. Raises `RowError` if a value is unusable.
    """
    schema = KINDS[kind]
    cleaned: Record = {}
    for field in (*schema.columns, *schema.optional):
        parse = _PARSERS[field]
        if field == "prompt" and schema.prompt_may_be_empty:
            parse = _parse_optional_text
        elif field in ("label", "label_shares"):
            parse = partial(parse, classes=classes)
        try:
            cleaned[field] = parse(record.get(field))
        except RowError as fault:
            raise RowError(fault.reason, f"{field}: {fault.detail}") from None
        except RecursionError:
            raise RowError("not-text", f"{field}: is nested too deeply") from None

    cleaned = {field: value for field, value in cleaned.items() if value is not None}
    if kind == "comparisons":
        _check_comparison(cleaned)
    if kind == "rankings":
        _check_ranking(cleaned)
    if kind == "labels":
        _check_label(cleaned, classes)
    if kind == "steps":
        _check_steps(cleaned)
    others = _other_columns(kind, record)
    if has_lone_surrogate(others):
        raise RowError("not-unicode", "a column beside the prompt contains bytes that are not UTF-8")
    return cleaned | others


def has_lone_surrogate(value: Any) -> bool:
    """Return whether a text in a value, or the name of a column, has one."""
    if isinstance(value, str):
        return LONE_SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(map(has_lone_surrogate, (*value, *value.values())))
    return isinstance(value, list | tuple) and any(map(has_lone_surrogate, value))


def _check_comparison(record: Record) -> None:
    """Check a comparison; if `rejected` has the larger share of the votes, swap the two."""
    if visible_identity(record["chosen"]) == visible_identity(record["rejected"]):
        raise RowError("identical-answers", "chosen and rejected are the same")
    if record.get("preference", 1.0) < 0.5:
        record["preference"] = 1 - record["preference"]
        record["chosen"], record["rejected"] = record["rejected"], record["chosen"]


def _check_ranking(record: Record) -> None:
    responses, ranks = record["responses"], record["ranks"]
    if len(responses) != len(ranks):
        raise RowError("rank-count", f"{len(responses)} responses, {len(ranks)} ranks")
    if len(responses) < 2:
        raise RowError("too-few-answers", f"expected two or more responses, found {len(responses)}")
    if len(set(ranks)) == 1:
        raise RowError("all-tied", f"every response has rank {ranks[0]}")
    rank_of: dict[str, int] = {}
    for rank, response in zip(ranks, responses, strict=True):
        if rank_of.setdefault(visible_identity(response), rank) != rank:
            raise RowError("identical-answers", "the same response has two ranks")


def _check_label(record: Record, classes: list[str]) -> None:
    """Check that no other class has a larger share of the votes than that of the label."""
    label, shares = record["label"], record.get("label_shares")
    if shares and not math.isclose(shares[label], max(shares)):
        other = shares.index(max(shares))
        raise RowError(
            "invalid-label",
            f"label is {classes[label]!r}, but label_shares has {shares[other]:g} for {classes[other]!r} and "
            f"{shares[label]:g} for {classes[label]!r}; correct one of the two",
        )


def _check_steps(record: Record) -> None:
    steps, labels = len(record["completions"]), len(record["labels"])
    if steps != labels:
        raise RowError("label-count", f"{steps} steps, {labels} labels; expected one label for each step")


def _parse_text(value: Any) -> str | list[Record]:
    """Return a string, or a list of messages reduced to role and content, without an empty system turn."""
    value = read_messages_cell(value)
    if isinstance(value, list) and value:
        messages = [_check_content(read_message(message)) for message in value]
        value = [message for message in messages if message["content"]]
        if value:
            return value
    if not isinstance(value, str) and value != []:
        raise RowError("not-text", f"expected text or messages, found {type(value).__name__}")
    return _check_string(value or "")


def _check_string(text: str) -> str:
    if is_blank(text):
        raise RowError("empty-text", "is empty or blank")
    if LONE_SURROGATE.search(text):
        raise RowError("not-unicode", "contains bytes that are not UTF-8")
    return text


def _check_content(message: Record) -> Record:
    """Return a message, with "" as the content of a system turn that says nothing."""
    if message["role"] == "system" and is_blank(message["content"]):
        return message | {"content": ""}
    _check_string(message["content"])
    return message


def _parse_response(value: Any, is_compared: bool = False, is_scored: bool = False) -> str | list[Record]:
    """Return a string or a list of one assistant message.

    One that is compared may be the rest of a conversation, from an assistant message to another one. One that
    is only scored may have weight 0.
    """
    value = read_messages_cell(value)
    response = _parse_text(value)
    if isinstance(response, str):
        return response
    roles = [message["role"] for message in response]
    if roles != ["assistant"] and not (is_compared and _is_rest_of_conversation(roles)):
        raise RowError(
            "not-one-answer",
            f"expected one assistant message, found {', '.join(roles)[:80]}"
            + ("" if is_compared or is_scored else "; pairs of whole conversations are format: dialogues"),
        )
    if not is_scored and not is_target(value[-1]):
        raise RowError("not-a-target", "the answer has weight 0: it is context, and not to be learned")
    return response


def _is_rest_of_conversation(roles: list[str]) -> bool:
    """Return whether the turns go from the assistant to the assistant, with another one after each."""
    return roles[0] == roles[-1] == "assistant" and not any(
        one == other == "assistant" for one, other in pairwise(roles)
    )


def _parse_optional_text(value: Any) -> str | list[Record]:
    is_empty = value is None or value == [] or (isinstance(value, str) and is_blank(value))
    return "" if is_empty else _parse_text(value)


def _parse_each(parse: Callable[[Any], Any], reason: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(reason, f"expected a list, found {type(value).__name__}")
    return [parse(item) for item in value]


def _parse_steps(value: Any) -> list[str]:
    steps = _parse_each(lambda step: step, "no-steps", read_list_cell(value))
    if not steps:
        raise RowError("no-steps", "the response has no step")
    for number, step in enumerate(steps, 1):
        if not isinstance(step, str):
            raise RowError("not-text", f"step {number}: expected text, found {type(step).__name__}")
        try:
            _check_string(step)
        except RowError as fault:
            raise RowError(fault.reason, f"step {number} {fault.detail}") from None
    return steps


def _parse_number(value: Any) -> float:
    """Return a number that fp32 holds; CSV has it as text."""
    try:
        number = float("a bool" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise RowError("not-a-number", f"found {preview(value)}") from None
    if not abs(number) <= MAX_NUMBER:  # NaN too
        raise RowError("not-finite", f"expected a finite number of 32 bits, found {preview(value)}")
    return number


def _parse_rank(value: Any) -> int:
    try:
        rank = _parse_number(value)
    except RowError:
        rank = 0
    if not 1 <= rank <= MAX_COUNT or rank != int(rank):
        raise RowError(
            "not-a-rank", f"expected whole numbers from 1 (the best) upwards; found {preview(value)}"
        )
    return int(rank)


def _parse_margin(value: Any) -> float | None:
    return None if value in (None, "") else _parse_number(value)


def _parse_share(value: Any) -> float | None:
    share = _parse_margin(value)
    if share is not None and not 0 <= share <= 1:
        raise RowError("not-a-share", f"expected a share of votes from 0 to 1, found {preview(value)}")
    return share


def _parse_shares(value: Any, classes: list[str]) -> list[float] | None:
    if value in (None, ""):
        return None
    shares = _parse_each(_parse_number, "not-a-share", read_list_cell(value))
    is_whole = math.isclose(sum(shares), 1.0, abs_tol=1e-6)
    if len(shares) != len(classes) or min(shares, default=0) < 0 or not is_whole:
        raise RowError(
            "not-a-share",
            f"expected {len(classes)} shares, one of each class, whose sum is 1; found {preview(value)}",
        )
    return shares


def _parse_count(value: Any) -> int | None:
    count = _parse_margin(value)
    if count is not None and (not 1 <= count <= MAX_COUNT or count != int(count)):
        raise RowError(
            "not-a-count", f"expected a whole number from 1 to {MAX_COUNT:,}, found {preview(value)}"
        )
    return None if count is None else int(count)


def _parse_origin(value: Any) -> str | None:
    try:
        text = "" if value is None else str(value)
    except ValueError:  # an integer of too many digits
        raise RowError("not-text", f"expected text, found {preview(value)}") from None
    return None if is_blank(text) else _check_string(text)


def _parse_answer(value: Any) -> str | None:
    if not isinstance(value, str | int | float | None):
        raise RowError("not-text", f"expected text or a number, found {type(value).__name__}")
    return _parse_origin(value)


_PARSERS: dict[str, Callable[..., Any]] = {
    "prompt": _parse_text,
    "completion": _parse_response,
    "chosen": partial(_parse_response, is_compared=True),
    "rejected": partial(_parse_response, is_compared=True),
    "response": partial(_parse_response, is_scored=True),
    "responses": partial(_parse_each, partial(_parse_response, is_compared=True), "not-text"),
    "ranks": partial(_parse_each, _parse_rank, "not-a-rank"),
    "label": parse_label,
    "label_shares": _parse_shares,
    "rating": _parse_number,
    "margin": _parse_margin,
    "source": _parse_origin,
    "preference": _parse_share,
    "votes": _parse_count,
    "completions": _parse_steps,
    "labels": partial(_parse_each, parse_verdict, "label-count"),
    "answer": _parse_answer,
}


# Between records


def _mark_contradictions(items: list[ParsedRecord]) -> None:
    """Set the fault of records on one prompt that disagree. One alone on its prompt disagrees with none."""
    by_prompt: dict[Hashable, list[ParsedRecord]] = defaultdict(list)
    for item in items:
        by_prompt[item.kind, digest(canonical_text(item.record["prompt"]))].append(item)
    for group in by_prompt.values():
        if len(group) > 1:
            _mark_disagreement(group)


def _mark_disagreement(group: list[ParsedRecord]) -> None:
    """Set the fault of the records on one prompt that judge something as another one does not.

    Texts are numbered, so that the half a million pairs of a thousand responses fit in memory.
    """
    numbers: dict[bytes, int] = {}
    first: dict[Hashable, tuple[Hashable, ParsedRecord]] = {}  # subject -> a verdict and who gives it
    other: dict[Hashable, ParsedRecord] = {}  # subject -> who first gives another verdict
    for item in group:
        for subject, verdict in _judgements(item, numbers):
            earlier = first.setdefault(subject, (verdict, item))
            if earlier[0] != verdict:
                other.setdefault(subject, item)

    for item in group if other else ():
        opposing = (
            other[subject] if first[subject][0] == verdict else first[subject][1]
            for subject, verdict in _judgements(item, numbers)
            if subject in other
        )
        if opponent := next(opposing, None):
            item.fault = RowError("contradiction", f"{location(opponent.rows)} disagrees")


def _judgements(item: ParsedRecord, numbers: dict[bytes, int]) -> Iterator[tuple[Hashable, Hashable]]:
    """Yield (subject, verdict) pairs; two verdicts on one subject contradict each other."""

    def number(text: Any) -> int:
        return numbers.setdefault(digest(canonical_text(text)), len(numbers))

    record = item.record
    match item.kind:
        case "steps":
            yield number(record["completions"]), tuple(record["labels"])
        case "prompts" if not carries_nothing(record.get("answer")):
            yield "answer", canonical_text({"answer": record["answer"]})
        case "rankings":
            ranked = {"ranks": record["ranks"], "responses": list(map(number, record["responses"]))}
            for better, worse in ordered_pairs(ranked):
                yield (min(better, worse), max(better, worse)), better


def _lacks_answer(record: Record) -> bool:
    """Return whether the record of a prompt has no answer, for which another one may make up."""
    return carries_nothing(record.get("answer"))


def _mark_duplicates(items: list[ParsedRecord]) -> None:
    first: dict[bytes, ParsedRecord] = {}
    for item in items:
        identity = digest(record_identity(item.kind, item.record))
        earlier = first.setdefault(identity, item)
        if earlier is not item:
            if _lacks_answer(earlier.record) and not _lacks_answer(item.record):
                first[identity], earlier, item = item, item, earlier
            item.fault = RowError("duplicate", f"the same as {location(earlier.rows)}")
