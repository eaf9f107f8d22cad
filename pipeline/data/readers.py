"""Read raw sources into records with our columns. Imports no torch.

Only rows that cannot be read are refused here; `pipeline.data.validation` checks the values.

In: a file (CSV, TSV, JSON, JSONL, Parquet), a folder of files, a `save_to_disk` folder, or a hub dataset.
Out: a `ParsedRecord` per record, with the raw rows it came from; that of an unreadable row has a `RowError`.
A missing file, a missing column or an unknown file type raises `UserError`.
"""

import csv
import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Source, nearest
from pipeline.data.dialogues import parse_dialogue
from pipeline.data.schema import KINDS, RowError
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

# Column sets that a format accepts besides the columns of its kind.
# `Source.columns` maps these names to the columns of a file.
ALTERNATIVES: dict[str, list[tuple[str, ...]]] = {
    "dialogues": [("chosen", "rejected")],
    "rankings": [("prompt", "response", "rank")],
    "labels": [("text", "label"), ("messages", "label")],
    "demonstrations": [("messages",)],
}

# Format -> the kind of records it yields, if the two names differ.
FORMAT_KINDS = {"dialogues": "comparisons"}


class RawRow(NamedTuple):
    """A row as read.

    `source` is a file, a hub id or `demo`.
    `line` is 1-based; it is the number of the row if the source has no lines.
    """

    source: str
    line: int
    data: Any
    fault: RowError | None = None


@dataclass
class ParsedRecord:
    """A candidate record of one kind, and its raw rows: several if a ranking has a row per response."""

    kind: str
    record: dict[str, Any]
    rows: list[RawRow]
    fault: RowError | None = None


def read_source(source: Source) -> list[ParsedRecord]:
    """Read all rows of `source`, or its first `limit`. Raises `UserError` if the source cannot be read."""
    rows = list(islice(progress_bar("reading", "rows", _iter_rows(source)), source.limit))
    columns = _choose_columns(source, rows)

    items = [_parse_row(source, columns, row) for row in rows]
    return _group_rankings(items) if "rank" in columns else items


def source_files(source: Source) -> list[Path]:
    """Return the files of a source, sorted, or its `save_to_disk` folder.

    Raises `UserError` if the path does not exist, has no file of a known type, or cannot have the `split`.
    """
    if not source.path:
        return []

    path = Path(source.path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check 'path' of the source")
    if _is_saved_dataset(path):
        return [path]
    if source.split != "train":
        raise UserError(
            f"{path}: split={source.split!r} is only read from a hub dataset or a save_to_disk folder; "
            "remove it, or name a file"
        )

    files, other_names = _split_files(path)
    if not files:
        raise UserError(
            f"{path}: expected {', '.join(READERS)}, a folder of such files, "
            f"or a save_to_disk folder of datasets; found {', '.join(other_names[:5]) or 'nothing'}"
        )
    return files


def skipped_files(source: Source) -> list[str]:
    """Return the names in a folder of files that are not read."""
    path = Path(source.path or "")
    return _split_files(path)[1] if source.path and path.is_dir() and not _is_saved_dataset(path) else []


def _split_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return (files to read, names of the others) of a folder or of a single file."""
    paths = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
    files = [file for file in paths if file.suffix.lower() in READERS and file.is_file()]
    return files, [file.name for file in paths if file not in files]


def canonical_text(value: Any) -> str:
    """Return the text that equal prompts or responses share.

    A single user or assistant message equals its content as a string.
    """
    match value:
        case str():
            return value
        case [{"role": "user" | "assistant", "content": str(content)}]:
            return content
    return json.dumps(value, sort_keys=True, default=str)


# Columns


def _kind_of_format(format: str) -> str:
    return FORMAT_KINDS.get(format, format)


def _column_sets(format: str) -> list[tuple[str, ...]]:
    standard = [KINDS[format].columns] if format in KINDS else []
    return [*standard, *ALTERNATIVES.get(format, [])]


def _choose_columns(source: Source, rows: list[RawRow]) -> tuple[str, ...]:
    """Return the column set of the format that the available and the mapped columns fill best.

    Raises `UserError` if a mapping is wrong or a column is missing.
    """
    column_sets, optional = _column_sets(source.format), KINDS[_kind_of_format(source.format)].optional
    available = list(dict.fromkeys(name for row in rows if not row.fault for name in row.data))
    known = dict.fromkeys([*(name for columns in column_sets for name in columns), *optional])
    _check_mapping(source, list(known), available)

    # A mapped column must be read, so a column set without it is not the one the user means.
    mapped = source.columns | source.values
    candidates = [columns for columns in column_sets if mapped.keys() <= {*columns, *optional}] or column_sets
    missing = {
        columns: [name for name in columns if name not in mapped and name not in available]
        for columns in candidates
    }
    columns = min(candidates, key=lambda columns: len(missing[columns]))
    if available and missing[columns]:
        raise _missing_column(source, missing[columns][0], available)
    return columns


def _check_mapping(source: Source, known: list[str], available: list[str]) -> None:
    """Raise `UserError` if `columns` or `values` names an unknown column, or maps one that no row has."""
    for ours, theirs in (source.columns | {name: [] for name in source.values}).items():
        if ours not in known:
            raise UserError(
                f"{_describe(source)}: columns maps {ours!r}, expected one of {', '.join(known)}"
                f"{nearest(ours, known)}"
            )
        for name in [theirs] if isinstance(theirs, str) else theirs:
            if available and name not in available:
                raise UserError(
                    f"{_describe(source)}: columns maps {ours!r} to {name!r}, found {', '.join(available)}"
                    f"{nearest(name, available)}"
                )


def _missing_column(source: Source, name: str, available: list[str]) -> UserError:
    """Build the error for a missing column, with the mapping that would supply it."""
    if len(available) == 1 and {";", "\t"} & set(available[0]):
        return UserError(
            f"{_describe(source)} needs a column {name!r}, found only {available[0]!r}; "
            "separate fields by commas, or by tabs in a .tsv"
        )
    theirs = next(iter(difflib.get_close_matches(name, available, n=1)), "THEIRS")
    return UserError(
        f"{_describe(source)} needs a column {name!r}, found {', '.join(available)}; "
        f"use columns: {{{name}: {theirs}}}"
    )


def _describe(source: Source) -> str:
    return f"{source.path or source.hub}: format {source.format}"


def _parse_row(source: Source, columns: tuple[str, ...], row: RawRow) -> ParsedRecord:
    """Map the columns of a row to ours; the fault of a wrong row goes into its record."""
    kind = _kind_of_format(source.format)
    try:
        if row.fault:
            raise row.fault
        names = [*columns, *KINDS[kind].optional]
        values = {name: _column_value(row.data, source.columns.get(name, name)) for name in names}
        return ParsedRecord(kind, _to_record(columns, values | source.values), [row])
    except RowError as fault:
        return ParsedRecord(kind, {}, [row], fault)


def _column_value(data: dict[str, Any], column: str | list[str]) -> Any:
    """Return the value of a column, or the texts of several joined by a blank line, without the empty ones.

    If one of several is not text, return it: validation refuses it.
    """
    if isinstance(column, str):
        return data.get(column)

    values = [value for value in map(data.get, column) if value is not None]
    parts = [value for value in values if not isinstance(value, str) or value.strip()]
    not_text = [part for part in parts if not isinstance(part, str)]
    return not_text[0] if not_text else "\n\n".join(parts)


def _to_record(columns: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """Convert the values of one column set to the columns of the kind.

    Raises `RowError` if the text is no dialogue or the messages are no list.
    """
    if "prompt" in columns:
        return values
    if "text" in columns:
        return values | {"prompt": "", "completion": values["text"]}
    if "chosen" in columns:
        return values | parse_dialogue(values["chosen"], values["rejected"])
    if not isinstance(values["messages"], list):
        raise RowError("not-text", f"messages: expected a list, found {type(values['messages']).__name__}")
    return values | {"prompt": values["messages"][:-1], "completion": values["messages"][-1:]}


def _group_rankings(items: list[ParsedRecord]) -> list[ParsedRecord]:
    """Merge items of one response each into one ranking per prompt; their rows need not be adjacent.

    The same response at the same rank counts once. Faulty items come last.
    """
    rankings: dict[str, ParsedRecord] = {}
    seen: set[str] = set()
    for item in (item for item in items if not item.fault):
        prompt, response, rank = item.record["prompt"], item.record["response"], item.record["rank"]
        identity = canonical_text([prompt, response, rank])
        if identity in seen:
            item.fault = RowError("duplicate", "an earlier row of this prompt has the same response and rank")
            continue
        seen.add(identity)

        ranking = rankings.setdefault(
            canonical_text(prompt),
            ParsedRecord("rankings", {"prompt": prompt, "responses": [], "ranks": []}, []),
        )
        ranking.record["responses"].append(response)
        ranking.record["ranks"].append(rank)
        ranking.rows += item.rows

    return [*rankings.values(), *(item for item in items if item.fault)]


# Files


def _iter_rows(source: Source) -> Iterator[RawRow]:
    if source.hub or _is_saved_dataset(Path(source.path or "")):
        yield from _read_dataset(str(source.hub or source.path), _load_dataset(source))
    else:
        for file in source_files(source):
            yield from READERS[file.suffix.lower()](file)


def _read_json(path: Path) -> Iterator[RawRow]:
    """Read an array of objects, or an object per line, as many `.json` files have it."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if not text.lstrip().startswith("[") and '"' in text.lstrip().partition("\n")[0]:
        yield from _read_jsonl(path)
        return

    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, list):
        raise UserError(
            f"{path}: expected an array of objects, or an object per line; found one {type(values).__name__}"
        )
    yield from (_to_raw_row(path, number, value) for number, value in enumerate(values, 1))


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield _to_raw_row(path, number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield RawRow(str(path), number, line.rstrip("\n"), RowError("unreadable-line", str(error)))


def _to_raw_row(path: Path, number: int, value: Any) -> RawRow:
    fault = None
    if not isinstance(value, dict):
        fault = RowError("unreadable-line", f"expected an object, found {type(value).__name__}")
    return RawRow(str(path), number, value, fault)


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)
    # newline="" keeps newlines inside fields.
    # Bytes that are not UTF-8 become lone surrogates, which the validation finds.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        records = _iter_csv_records(path, csv.reader(lines, delimiter=delimiter, strict=True))
        _, header = next(records, (1, []))
        if len(set(header)) < len(header):
            raise UserError(
                f"{path}: expected column names, each of them once, in the first line; found {header}"
            )

        for line, fields in records:
            if len(fields) == len(header):
                yield RawRow(str(path), line, dict(zip(header, fields, strict=True)))
            else:
                detail = f"expected {len(header)} fields, found {len(fields)}"
                yield RawRow(str(path), line, fields, RowError("unreadable-line", detail))


def _iter_csv_records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line of a record, its fields); blank lines are not records.

    After a stray quote the start of the next record is unknown, so that raises `UserError` and drops no row.
    """
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: not valid CSV from here on: {error}; "
                'close the quotes of each field, and write a quote inside one as ""'
            ) from None
        if fields:
            yield line, fields


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        values = parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, ImportError) as error:
        raise UserError(f"{path}: not readable as Parquet: {_first_line(error)}") from None
    yield from (RawRow(str(path), number, value) for number, value in enumerate(values, 1))


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, "\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# Datasets


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_dataset(source: Source) -> Any:
    """Load the `datasets.Dataset` of a hub id or of a `save_to_disk` folder.

    Raises `UserError` if it cannot be read or lacks the split.
    """
    import datasets

    try:
        if source.hub:
            return datasets.load_dataset(
                source.hub, source.subset, split=source.split, revision=source.revision
            )
        data = datasets.load_from_disk(str(source.path))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = (
            "check hub, subset, split and revision of the source, or download it and set its path"
            if source.hub
            else "save it again"
        )
        raise UserError(
            f"{source.hub or source.path}: not readable as a dataset: {_first_line(error)}; {hint}"
        ) from None

    if isinstance(data, datasets.Dataset):
        return data
    if source.split not in data:
        raise UserError(
            f"{source.path}: no split {source.split!r}, found {', '.join(data)}; set 'split' of the source"
        )
    return data[source.split]


def _read_dataset(name: str, dataset: Any) -> Iterator[RawRow]:
    """Yield the rows, with class indices replaced by the names that the features have for them."""
    class_names = {
        column: feature.names for column, feature in dataset.features.items() if hasattr(feature, "int2str")
    }
    for number, data in enumerate(_iter_dataset(name, dataset), 1):
        named = {
            column: names[data[column]]
            for column, names in class_names.items()
            if data[column] in range(len(names))
        }
        yield RawRow(name, number, {**data, **named})


def _iter_dataset(name: str, dataset: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except (OSError, ValueError, OverflowError, ImportError) as error:
        raise UserError(
            f"{name}: has a value that cannot be read: {_first_line(error)}; "
            "drop that column, or save it as text"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
