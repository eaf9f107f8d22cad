"""Count the rows that are not kept, and write them to files. Imports no torch."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.data.json_rows import MAX_DEPTH
from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import MERGED, RawRow, RowError
from pipeline.data.shelf import Shelf

# Each row, and the reason why it is not kept, if any.
RowOutcomes = Iterable[tuple[RawRow, RowError | None]]


def row_outcomes(items: Sequence[ParsedRecord]) -> RowOutcomes:
    """Yield the rows of the records, with their faults.

    A row that gave several records has a fault if all of them do: that it is merged, or the first's.
    """
    for records in _records_by_row(items):
        faults = [item.fault for item in records]
        merged = next((fault for fault in faults if fault and fault.reason == MERGED), None)
        fault = merged or faults[0] if all(faults) else None
        yield from ((row, fault) for row in records[0].rows)


def count_left_out(items: Sequence[ParsedRecord]) -> Counter[str]:
    """Return how many records of rows that are kept are not kept themselves, by reason."""
    kept = (records for records in _records_by_row(items) if not all(item.fault for item in records))
    faults = (item.fault for records in kept for item in records)
    return Counter(fault.reason for fault in faults if fault and fault.reason != MERGED)


def _records_by_row(items: Sequence[ParsedRecord]) -> Iterator[Sequence[ParsedRecord]]:
    starts = [place for place, item in enumerate(items) if item.is_first]
    return (items[start:end] for start, end in pairwise([*starts, len(items)]))


def write_quarantine(outcomes: RowOutcomes, path: Path) -> None:
    """Write the faulty rows to `path`, one JSON object a line, sorted by source and line.

    Those that are merged with others are in `merged_rows.jsonl` beside it, if there are any.
    """
    entries = Shelf(path.parent)
    order: dict[str, list[tuple[str, int, int]]] = {path.name: []}
    for row, fault in outcomes:
        if fault:
            file = order.setdefault("merged_rows.jsonl" if fault.reason == MERGED else path.name, [])
            file.append((row.source, row.line, entries.append(json_line(_to_entry(row, fault)))))
    for name, places in order.items():
        with path.with_name(name).open("w", encoding="utf-8") as lines:
            lines.writelines(entries[place] for *_, place in sorted(places))


def _to_entry(row: RawRow, fault: RowError) -> dict[str, Any]:
    return {
        "source": row.source,
        "line": row.line,
        "reason": fault.reason,
        "detail": fault.detail,
        "row": row.data,
    }


def count_and_quarantine(outcomes: RowOutcomes, quarantine: Path) -> dict[str, Any]:
    """Write the faulty rows to `quarantine`; return the counts of all rows, in total and by source.

    kept + merged + quarantined == read.
    """
    read: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = defaultdict(Counter)

    def count() -> RowOutcomes:
        for row, fault in outcomes:
            read[row.source] += 1
            if fault:
                reasons[row.source][fault.reason] += 1
            yield row, fault

    write_quarantine(count(), quarantine)
    counts = {source: _to_counts(rows, reasons[source]) for source, rows in sorted(read.items())}
    return _to_counts(read.total(), sum(reasons.values(), Counter())) | {"by_source": counts}


def _to_counts(read: int, reasons: Counter[str]) -> dict[str, Any]:
    return {
        "read": read,
        "kept": read - reasons.total(),
        "merged": reasons[MERGED],
        "quarantined": {reason: count for reason, count in sorted(reasons.items()) if reason != MERGED},
    }


def json_line(value: Any) -> str:
    """Return one line of JSON that every JSON parser accepts."""
    return json.dumps(_json_safe(value), ensure_ascii=False, allow_nan=False) + "\n"


def _json_safe(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Replace what not every JSON parser accepts (NaN, lone surrogates, dates) by strings."""
    match value:
        case dict() | list() | tuple() if depth == 0:
            return "…"
        case dict():
            return {_json_safe(str(key)): _json_safe(item, depth - 1) for key, item in value.items()}
        case list() | tuple():
            return [_json_safe(item, depth - 1) for item in value]
        case None | bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
    return str(value).encode("utf-8", "backslashreplace").decode()
