"""Raw sources -> items: what each row says under our column names, judged only by whether it can be read.

In: a file (CSV, TSV, JSON, JSONL, Parquet), a folder of them, a `save_to_disk` folder, a hub dataset, or the demo world.
Out: an `Item` per record to be, with the raw rows it came from; an unreadable row is an item with a `Fault`.
A missing file, a missing column or an unknown type of file is a `UserError`.
"""

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Source, nearest
from pipeline.data.schema import KINDS
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

# Column sets that a format may come in beside the columns of its kind; `Source.columns` maps these names to a file's own.
ALTERNATIVES: dict[str, list[tuple[str, ...]]] = {
    "dialogues": [("chosen", "rejected")],
    "rankings": [("prompt", "response", "rank")],
    "labels": [("text", "label"), ("messages", "label")],
    "demonstrations": [("messages",)],
}
FORMAT_KINDS = {
    "dialogues": "comparisons"
}  # format -> the kind of records it makes, if that has another name
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")

ASSISTANT_TURN = "\n\nAssistant:"

TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(Exception):
    """Why a row is not kept: `reason` is counted, `detail` helps whoever reads quarantine.jsonl."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class RawRow(NamedTuple):
    """A raw row: its file, hub id or `demo`; its 1-based line (the number of the row where there are no lines); what was found."""

    source: str
    line: int
    data: Any
    fault: RowError | None = None


@dataclass
class ParsedRecord:
    """A record to be of one kind, and its raw rows: several where a ranking has a row per answer."""

    kind: str
    record: dict[str, Any]
    rows: list[RawRow]
    fault: RowError | None = None


def read_source(source: Source) -> list[ParsedRecord]:
    """All rows of `source`, or its first `limit`. Raises `UserError` where the source as a whole cannot be read."""
    rows = list(islice(progress_bar("reading", "rows", _rows(source)), source.limit))
    shape = _shape(source, rows)
    items = [_item(source, shape, row) for row in rows]
    return _one_per_prompt(items) if "rank" in shape else items


def source_files(source: Source) -> list[Path]:
    """What a source reads from disk: its files, sorted, or its `save_to_disk` folder. Raises `UserError`."""
    if not source.path:
        return []
    path = Path(source.path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check 'path' of the source")
    if _is_saved_dataset(path):
        return [path]
    if source.split != "train":
        raise UserError(
            f"{path}: split={source.split!r} is only read from a hub dataset or a save_to_disk folder; remove it, or name a file"
        )
    known, others = _sorted_out(path)
    if not known:
        names = ", ".join(others[:5]) or "nothing"
        raise UserError(
            f"{path}: expected {', '.join(READERS)}, a folder of such files, or one of datasets' save_to_disk; found {names}"
        )
    return known


def skipped_files(source: Source) -> list[str]:
    """The names in a folder of files that are not read."""
    path = Path(source.path or "")
    return _sorted_out(path)[1] if source.path and path.is_dir() and not _is_saved_dataset(path) else []


def _sorted_out(path: Path) -> tuple[list[Path], list[str]]:
    """(files to read, names of others) of a folder, or of a file."""
    found = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
    known = [file for file in found if file.suffix.lower() in READERS and file.is_file()]
    return known, [file.name for file in found if file not in known]


def canonical_text(value: Any) -> str:
    """The text that equal prompts or answers share; a lone user or assistant message equals its content as a string."""
    match value:
        case str():
            return value
        case [{"role": "user" | "assistant", "content": str(content)}]:
            return content
    return json.dumps(value, sort_keys=True, default=str)


def parse_dialogue(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Two whole dialogues -> prompt, chosen, rejected as TRL messages; the prompt is what they share up to the last answer.

    Takes text in hh-rlhf's style (`\\n\\nHuman: … \\n\\nAssistant: …`) or message lists. Raises `Fault`.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = [
            match.start()
            for match in re.finditer(ASSISTANT_TURN, chosen)
            if rejected.startswith(chosen[: match.end()])
        ]
        if not shared:
            raise RowError("not-a-dialogue", f"the two share no {ASSISTANT_TURN!r}")
        return {
            "prompt": parse_turns(chosen[: shared[-1]]),
            "chosen": parse_turns(chosen[shared[-1] :]),
            "rejected": parse_turns(rejected[shared[-1] :]),
        }
    if isinstance(chosen, list) and isinstance(rejected, list):
        differ = (
            n for n, (one, other) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)) if one != other
        )
        cut = next(differ, min(len(chosen), len(rejected)) - 1)
        return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}
    raise RowError(
        "not-text", f"expected two dialogues, found {type(chosen).__name__} and {type(rejected).__name__}"
    )


def parse_turns(text: str) -> list[dict[str, str]]:
    """An hh-rlhf dialogue as TRL messages, stripped; several turns in a row of one speaker become one. Raises `Fault`."""
    head, *parts = TURN.split(text)
    if head.strip():
        raise RowError("not-a-dialogue", "there is text before the first 'Human:' or 'Assistant:'")
    spoken = groupby(zip(parts[::2], parts[1::2], strict=True), key=lambda turn: turn[0])
    return [
        {"role": TURN_ROLES[who], "content": "\n\n".join(said.strip() for _, said in group).strip()}
        for who, group in spoken
    ]


# Columns


def _kind(format: str) -> str:
    return FORMAT_KINDS.get(format, format)


def _column_sets(format: str) -> list[tuple[str, ...]]:
    own = [KINDS[format].columns] if format in KINDS else []
    return [*own, *ALTERNATIVES.get(format, [])]


def _shape(source: Source, rows: list[RawRow]) -> tuple[str, ...]:
    """The shape of its format that the columns found, and mapped, make up. Raises `UserError`."""
    where = f"{source.path or source.hub}: format {source.format}"
    shapes, optional = _column_sets(source.format), KINDS[_kind(source.format)].optional
    known = dict.fromkeys([*(name for shape in shapes for name in shape), *optional])
    found = list(dict.fromkeys(name for row in rows if not row.fault for name in row.data))
    for ours, theirs in (source.columns | {name: [] for name in source.values}).items():
        if ours not in known:
            raise UserError(
                f"{where}: columns maps {ours!r}, expected one of {', '.join(known)}{nearest(ours, known)}"
            )
        for name in [theirs] if isinstance(theirs, str) else theirs:
            if found and name not in found:
                raise UserError(
                    f"{where}: columns maps {ours!r} to {name!r}, found {', '.join(found)}{nearest(name, found)}"
                )
    # What is mapped must be read: of two shapes, the one without it is not meant.
    meant = [
        shape for shape in shapes if (source.columns | source.values).keys() <= {*shape, *optional}
    ] or shapes
    missing = {
        shape: [name for name in shape if name not in source.columns | source.values and name not in found]
        for shape in meant
    }
    shape = min(meant, key=lambda shape: len(missing[shape]))
    if found and missing[shape]:
        name = missing[shape][0]
        if len(found) == 1 and {";", "\t"} & set(found[0]):
            raise UserError(
                f"{where} needs a column {name!r}, found only {found[0]!r}; separate fields by commas, or by tabs in a .tsv"
            )
        theirs = next(iter(difflib.get_close_matches(name, found, n=1)), "THEIRS")
        raise UserError(
            f"{where} needs a column {name!r}, found {', '.join(found)}; use columns: {{{name}: {theirs}}}"
        )
    return shape


def _item(source: Source, shape: tuple[str, ...], row: RawRow) -> ParsedRecord:
    kind = _kind(source.format)
    try:
        if row.fault:
            raise row.fault
        names = [*shape, *KINDS[kind].optional]
        found = {name: _value(row.data, source.columns.get(name, name)) for name in names} | source.values
        return ParsedRecord(kind, _record(shape, found), [row])
    except RowError as fault:
        return ParsedRecord(kind, {}, [row], fault)


def _value(data: dict[str, Any], column: str | list[str]) -> Any:
    """The value of a column, or the texts of several joined by a blank line, empty ones left out."""
    if isinstance(column, str):
        return data.get(column)
    parts = [
        part
        for part in map(data.get, column)
        if part is not None and (not isinstance(part, str) or part.strip())
    ]
    wrong = [part for part in parts if not isinstance(part, str)]
    return wrong[0] if wrong else "\n\n".join(parts)


def _record(shape: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """Our columns out of those of `shape`. Raises `Fault`."""
    if "prompt" in shape:
        return values
    if "text" in shape:
        return values | {"prompt": "", "completion": values["text"]}
    if "chosen" in shape:
        return values | parse_dialogue(values["chosen"], values["rejected"])
    if not isinstance(values["messages"], list):
        raise RowError("not-text", f"messages: expected a list, found {type(values['messages']).__name__}")
    return values | {"prompt": values["messages"][:-1], "completion": values["messages"][-1:]}


def _one_per_prompt(items: list[ParsedRecord]) -> list[ParsedRecord]:
    """One ranking per prompt out of an item per answer, wherever its rows are; the same answer at the same rank counts once."""
    rankings: dict[str, ParsedRecord] = {}
    seen: set[str] = set()
    for item in (item for item in items if not item.fault):
        prompt, response, rank = item.record["prompt"], item.record["response"], item.record["rank"]
        answer = canonical_text([prompt, response, rank])
        if answer in seen:
            item.fault = RowError("duplicate", "this prompt has the same answer at the same rank above")
            continue
        seen.add(answer)
        ranking = rankings.setdefault(
            canonical_text(prompt),
            ParsedRecord("rankings", {"prompt": prompt, "responses": [], "ranks": []}, []),
        )
        ranking.record["responses"].append(response)
        ranking.record["ranks"].append(rank)
        ranking.rows += item.rows
    return [*rankings.values(), *(item for item in items if item.fault)]


# Files


def _rows(source: Source) -> Iterator[RawRow]:
    if source.hub or _is_saved_dataset(Path(source.path or "")):
        yield from _dataset_rows(str(source.hub or source.path), _dataset(source))
    else:
        for file in source_files(source):
            yield from READERS[file.suffix.lower()](file)


def _json(path: Path) -> Iterator[RawRow]:
    """An array of objects, or, as in many `.json` files, an object per line."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if not text.lstrip().startswith("[") and '"' in text.lstrip().partition("\n")[0]:
        yield from _jsonl(path)
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, list):
        raise UserError(
            f"{path}: expected an array of objects, or an object per line; found one {type(values).__name__}"
        )
    yield from (_object(path, number, value) for number, value in enumerate(values, 1))


def _jsonl(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield _object(path, number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield RawRow(str(path), number, line.rstrip("\n"), RowError("unreadable-line", str(error)))


def _object(path: Path, number: int, value: Any) -> RawRow:
    fault = (
        None
        if isinstance(value, dict)
        else RowError("unreadable-line", f"expected an object, found {type(value).__name__}")
    )
    return RawRow(str(path), number, value, fault)


def _csv(path: Path, delimiter: str = ",") -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)
    # newline="" leaves newlines in fields as they are; bytes that are not UTF-8 become lone surrogates, which the checks find.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        records = _csv_records(path, csv.reader(lines, delimiter=delimiter, strict=True))
        _, header = next(records, (1, []))
        if len(set(header)) < len(header):
            raise UserError(
                f"{path}: expected column names, each of them once, in the first line; found {header}"
            )
        for line, fields in records:
            if len(fields) != len(header):
                yield RawRow(
                    str(path),
                    line,
                    fields,
                    RowError("unreadable-line", f"expected {len(header)} fields, found {len(fields)}"),
                )
            else:
                yield RawRow(str(path), line, dict(zip(header, fields, strict=True)))


def _csv_records(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(line a record begins on, its fields); blank lines are no records. After a stray quote nobody can tell where the next record begins:
    that is a `UserError`, and not a row less."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f'{path}:{line}: not valid CSV from here on: {error}; close the quotes of each field, and write a quote inside one as ""'
            ) from None
        if fields:
            yield line, fields


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        values = parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, ImportError) as error:
        raise UserError(f"{path}: not readable as Parquet: {_first_line(error)}") from None
    yield from (RawRow(str(path), number, value) for number, value in enumerate(values, 1))


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


# Datasets


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _dataset(source: Source) -> Any:
    """The `datasets.Dataset` of a hub id or of a `save_to_disk` folder. Raises `UserError`."""
    import datasets

    try:
        if source.hub:
            return datasets.load_dataset(
                source.hub, source.subset, split=source.split, revision=source.revision
            )
        found = datasets.load_from_disk(str(source.path))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        fix = (
            "check hub, subset, split and revision of the source, or download it and give its path"
            if source.hub
            else "save it again"
        )
        raise UserError(
            f"{source.hub or source.path}: not readable as a dataset: {_first_line(error)}; {fix}"
        ) from None
    if isinstance(found, datasets.Dataset):
        return found
    if source.split not in found:
        raise UserError(
            f"{source.path}: no split {source.split!r}, found {', '.join(found)}; set 'split' of the source"
        )
    return found[source.split]


def _dataset_rows(name: str, dataset: Any) -> Iterator[RawRow]:
    """The rows, with the names of classes in the place of indices where the features hold them."""
    classes = {
        column: feature.names for column, feature in dataset.features.items() if hasattr(feature, "int2str")
    }
    for number, data in enumerate(_decoded(name, dataset), 1):
        named = {
            column: names[data[column]]
            for column, names in classes.items()
            if data[column] in range(len(names))
        }
        yield RawRow(name, number, {**data, **named})


def _decoded(name: str, dataset: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except (OSError, ValueError, OverflowError, ImportError) as error:
        raise UserError(
            f"{name}: has a value that cannot be read: {_first_line(error)}; drop that column, or save it as text"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
