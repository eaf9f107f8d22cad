"""Tell what a file of feedback looks like, and which config reads it. Writes nothing. Imports no torch."""

from collections import Counter
from itertools import islice
from typing import Any

import yaml

from pipeline.config import PrepareStage, Source
from pipeline.data.columns import SEE_INSPECT, find_format
from pipeline.data.messages import preview
from pipeline.data.notes import readable_columns, unread_parts_note
from pipeline.data.quarantine import count_left_out, row_outcomes
from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import MERGED
from pipeline.data.sources import describe_reading, iter_rows
from pipeline.errors import UserError
from pipeline.formatting.tables import align_columns
from pipeline.prepare.stage import read_records


def inspect_file(config: PrepareStage) -> None:
    """Print the columns of the first source of a config, the rows that would be kept, and its YAML.

    Raises `UserError` if no config is known that reads the file, or if none of its rows can be kept.
    """
    source = config.source[0]
    print("\n".join([f"{source.path}:", *(f"  {line}" for line in _describe_columns(source))]))
    try:
        items, _ = read_records(config)
    except UserError as error:
        raise UserError(str(error).removesuffix(SEE_INSPECT.format(name=source.path))) from None

    if not source.map:
        source = find_format(source, readable_columns(items))
    for line in [*_describe_outcomes(items), *describe_reading(source)]:
        print(f"  {line}")
    keys = source.model_dump(mode="json", exclude_defaults=True)
    ties = {"ties": config.ties} if config.ties == "keep" else {}
    text = yaml.safe_dump({"source": keys} | ties, sort_keys=False, allow_unicode=True, width=1000)
    print(f"\nThis reads it, in prepare.yaml:\n\n{text}", end="")


def _describe_columns(source: Source) -> list[str]:
    """Return a line for each column, with its type and its value in the first row that can be read."""
    rows = islice((row.data for row in iter_rows(source) if not row.fault), 1)
    cells = [(name, type(value).__name__, preview(value)) for row in rows for name, value in row.items()]
    return align_columns(cells).splitlines() if cells else []


def _describe_outcomes(items: list[ParsedRecord]) -> list[str]:
    """Return the number of records of each kind, and the number of rows for each reason not to keep one."""
    kinds = Counter(item.kind for item in items if not item.fault)
    faults = [fault and fault.reason for _, fault in row_outcomes(items)]
    reasons = Counter(reason for reason in faults if reason)
    kept, merged = len(faults) - reasons.total(), reasons.pop(MERGED, 0)
    lines = [
        f"{kept:,} of {len(faults):,} rows kept, as {_list_counts(kinds)}",
        f"merged with others as votes: {merged:,}" if merged else "",
        f"quarantined: {_list_counts(reasons)}" if reasons else "",
        f"left out of the rows kept: {_list_counts(left)}" if (left := count_left_out(items)) else "",
        unread_parts_note(reasons),
    ]
    return [line for line in lines if line]


def _list_counts(counts: Counter[Any]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
