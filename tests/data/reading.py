"""Sources read as the tests do it: records, and faults by their line."""

import json
from pathlib import Path
from typing import Any

from pipeline.config import Source
from pipeline.data.readers import ParsedRecord, read_source


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(format: str, path: Path, **options: Any) -> list[ParsedRecord]:
    return read_source(Source(format=format, path=str(path), **options))


def records(format: str, path: Path, **options: Any) -> list[dict[str, Any]]:
    items = read(format, path, **options)
    assert all(item.fault is None for item in items)
    return [item.record for item in items]


def faults(items: list[ParsedRecord]) -> list[tuple[int, str]]:
    return [(row.line, item.fault.reason) for item in items for row in item.rows if item.fault]
