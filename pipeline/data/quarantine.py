"""Count the rows that are not kept, and write them to quarantine.jsonl. Imports no torch."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from pipeline.data.schema import RawRow, RowError

# Each row, and the reason why it is not kept, if any.
RowOutcomes = list[tuple[RawRow, RowError | None]]


def write_quarantine(outcomes: RowOutcomes, path: Path) -> None:
    """Write the faulty rows to `path`, one JSON object a line, sorted by source and line."""
    faulty = sorted(((row, fault) for row, fault in outcomes if fault), key=lambda pair: pair[0][:2])
    with path.open("w", encoding="utf-8") as lines:
        for row, fault in faulty:
            entry = {
                "source": row.source,
                "line": row.line,
                "reason": fault.reason,
                "detail": fault.detail,
                "row": row.data,
            }
            lines.write(json_line(entry))


def count_and_quarantine(outcomes: RowOutcomes, quarantine: Path) -> dict[str, Any]:
    """Write the faulty rows to `quarantine`; return the counts of all rows, in total and by source."""
    by_source: dict[str, RowOutcomes] = defaultdict(list)
    for row, fault in outcomes:
        by_source[row.source].append((row, fault))

    write_quarantine(outcomes, quarantine)
    counts = {name: _count(source_outcomes) for name, source_outcomes in sorted(by_source.items())}
    return _count(outcomes) | {"by_source": counts}


def _count(outcomes: RowOutcomes) -> dict[str, Any]:
    reasons = Counter(fault.reason for _, fault in outcomes if fault)
    return {
        "read": len(outcomes),
        "kept": len(outcomes) - reasons.total(),
        "quarantined": dict(sorted(reasons.items())),
    }


def json_line(value: Any) -> str:
    """Return one line of JSON that every JSON parser accepts."""
    return json.dumps(_json_safe(value), ensure_ascii=False, allow_nan=False) + "\n"


def _json_safe(value: Any) -> Any:
    """Replace what not every JSON parser accepts (NaN, lone surrogates, dates) by strings."""
    match value:
        case dict():
            return {_json_safe(str(key)): _json_safe(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_safe(item) for item in value]
        case None | bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
    return str(value).encode("utf-8", "backslashreplace").decode()
