"""The rows that are not kept: counted by reason, and written to quarantine.jsonl with their source and line."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from pipeline.data.readers import RawRow, RowError

Judged = list[tuple[RawRow, RowError | None]]


def write_quarantine(judged: Judged, path: Path) -> None:
    """The faulty rows, by source and line, an object a line."""
    faulty = sorted(((row, fault) for row, fault in judged if fault), key=lambda pair: pair[0][:2])
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


def count_and_quarantine(judged: Judged, quarantine: Path) -> dict[str, Any]:
    """Write the faulty rows down and count all of them."""
    by_source: dict[str, Judged] = defaultdict(list)
    for row, fault in judged:
        by_source[row.source].append((row, fault))
    write_quarantine(judged, quarantine)
    return _count(judged) | {"by_source": {name: _count(rows) for name, rows in sorted(by_source.items())}}


def _count(judged: Judged) -> dict[str, Any]:
    reasons = Counter(fault.reason for _, fault in judged if fault)
    return {
        "read": len(judged),
        "kept": len(judged) - reasons.total(),
        "quarantined": dict(sorted(reasons.items())),
    }


def json_line(value: Any) -> str:
    """One line of JSON that any reader of it takes."""
    return json.dumps(_json_safe(value), ensure_ascii=False, allow_nan=False) + "\n"


def _json_safe(value: Any) -> Any:
    """What any reader of JSON takes: no NaN, no lone surrogates, no dates."""
    match value:
        case dict():
            return {_json_safe(str(key)): _json_safe(part) for key, part in value.items()}
        case list() | tuple():
            return [_json_safe(part) for part in value]
        case None | bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
    return str(value).encode("utf-8", "backslashreplace").decode()
