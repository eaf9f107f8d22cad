"""Save records as a `DatasetDict`, with a bounded number of them in memory."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.schema import KINDS, ROLES, Record
from pipeline.errors import one_line
from pipeline.prepare.column_types import values_error

RecordsByKind = dict[str, Sequence[Record]]

# For rows without the column if others have it, by kind; each says the same as no value. Others are null.
DEFAULTS: dict[str, dict[str, float]] = {
    "comparisons": {"preference": 1.0, "votes": 1},
    "labels": {"votes": 1},
    "ratings": {"votes": 1},
}

BATCH_ROWS = 1000
BATCH_CHARS = 2**24


class Survey:
    """What the features of a kind depend on, over all of its records."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.columns: dict[str, None] = {}  # in order of appearance
        self.has_messages = False

    def add(self, record: Record) -> None:
        self.columns |= dict.fromkeys(record)
        self.has_messages = self.has_messages or any(
            isinstance(text, list) for text in _texts_of(self.kind, record)
        )


def save_kind(
    parts: RecordsByKind, survey: Survey, classes: list[str], others: dict[str, Any], folder: Path
) -> None:
    """Save the splits of one kind as a `DatasetDict`.

    A column has one type, so if any text is a list of messages, all texts become messages. `others` are the
    Arrow types of columns that are not of the kind. Raises `UserError` if one cannot hold its values.
    """
    import datasets

    datasets.disable_progress_bars()
    kind = KINDS[survey.kind]
    ordered = dict.fromkeys([*kind.columns, *kind.optional, *survey.columns])
    columns = [name for name in ordered if name in survey.columns]
    features = _to_features(columns, classes, survey.has_messages, others)

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        data = datasets.DatasetDict(
            {
                split: _to_dataset(part, features, survey, Path(scratch, split))
                for split, part in parts.items()
            }
        )
        # Without num_shards an empty split would get no shard, and could not be loaded again.
        data.save_to_disk(str(folder), num_shards={split: 1 for split, part in parts.items() if not part})


def _to_features(columns: list[str], classes: list[str], as_messages: bool, others: dict[str, Any]) -> Any:
    """Return the `datasets.Features` of the columns."""
    import datasets
    import pyarrow

    string = datasets.Value("string")
    text = datasets.List({"role": string, "content": string}) if as_messages else string
    types = {
        **dict.fromkeys(ROLES, text),
        "responses": datasets.List(text),
        "ranks": datasets.List(datasets.Value("int64")),
        "completions": datasets.List(string),
        "labels": datasets.List(datasets.Value("bool")),
        "label": datasets.ClassLabel(names=classes),
        "rating": datasets.Value("float64"),
        "margin": datasets.Value("float64"),
        "source": string,
        "preference": datasets.Value("float64"),
        "votes": datasets.Value("int64"),
        "label_shares": datasets.List(datasets.Value("float64")),
        "answer": string,
        **datasets.Features.from_arrow_schema(pyarrow.schema(others)),
    }
    return datasets.Features({name: types[name] for name in columns})


def _to_dataset(records: Sequence[Record], features: Any, survey: Survey, file: Path) -> Any:
    """Write the records to an Arrow file; return the `datasets.Dataset` that is mapped to it."""
    import datasets
    import pyarrow

    with (
        pyarrow.OSFile(str(file), "wb") as sink,
        pyarrow.ipc.new_stream(sink, features.arrow_schema) as writer,
    ):
        for batch in _batches(records):
            rows = [_with_messages(survey.kind, row) for row in batch] if survey.has_messages else batch
            missing = DEFAULTS.get(survey.kind, {})
            arrays = [
                _to_array(field, [row.get(field.name, missing.get(field.name)) for row in rows])
                for field in features.arrow_schema
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=features.arrow_schema))

    with file.open("rb") as stream:
        fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=fingerprint)


def _to_array(field: Any, values: list[Any]) -> Any:
    """Return the values as an Arrow array. Raises `UserError` for a number that the type does not hold."""
    import pyarrow

    try:
        return pyarrow.array(values, field.type)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise values_error(field.name, f"prepare: column {field.name!r}: {one_line(error)}") from None


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    chars = 0
    for record in records:
        batch.append(record)
        chars += _count_chars(record)
        if len(batch) == BATCH_ROWS or chars > BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _count_chars(value: Any) -> int:
    """Return the characters of all texts in a value, with one for each other value."""
    if isinstance(value, dict | list | tuple):
        return sum(map(_count_chars, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 1


def _texts_of(kind: str, record: Record) -> list[Any]:
    """Return the texts of a record that may be messages."""
    names = [name for name in KINDS[kind].columns if name in ROLES]
    return [*map(record.__getitem__, names), *(record["responses"] if kind == "rankings" else ())]


def _with_messages(kind: str, record: Record) -> Record:
    """Return a record with each text as a list of messages."""
    texts = {name: _to_messages(record[name], ROLES[name]) for name in KINDS[kind].columns if name in ROLES}
    if kind == "rankings":
        texts["responses"] = [_to_messages(text, "assistant") for text in record["responses"]]
    return record | texts


def _to_messages(text: Any, role: str) -> list[Any]:
    if isinstance(text, list):
        return text
    return [{"role": role, "content": text}] if text else []
