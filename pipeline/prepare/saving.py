"""Save records as a `DatasetDict`, with a bounded number of them in memory."""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.schema import KINDS, ROLES, Record

RecordsByKind = dict[str, Sequence[Record]]

# For rows without the column if others have it; each changes nothing in the loss.
DEFAULTS = {"margin": 0.0, "preference": 1.0, "votes": 1}

BATCH_ROWS = 1000
BATCH_CHARS = 2**24


class Survey:
    """What the features of a kind depend on, over all of its records."""

    def __init__(self) -> None:
        self.columns: set[str] = set()
        self.has_messages = False

    def add(self, record: Record) -> None:
        self.columns.update(record)
        self.has_messages = self.has_messages or any(isinstance(text, list) for text in _texts_of(record))


def save_kind(kind: str, parts: RecordsByKind, survey: Survey, classes: list[str], folder: Path) -> None:
    """Save the splits of one kind as a `DatasetDict`.

    A column has one type, so if any text is a list of messages, all texts become messages.
    """
    import datasets

    datasets.disable_progress_bars()
    columns = [*KINDS[kind].columns, *KINDS[kind].optional]
    features = _to_features(
        [name for name in columns if name in survey.columns], classes, survey.has_messages
    )

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        data = datasets.DatasetDict(
            {
                split: _to_dataset(part, features, survey.has_messages, Path(scratch, split))
                for split, part in parts.items()
            }
        )
        # Without num_shards an empty split would get no shard, and could not be loaded again.
        data.save_to_disk(str(folder), num_shards={split: 1 for split, part in parts.items() if not part})


def _to_features(columns: list[str], classes: list[str], as_messages: bool) -> Any:
    """Return the `datasets.Features` of the columns."""
    import datasets

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
    }
    return datasets.Features({name: types[name] for name in columns})


def _to_dataset(records: Sequence[Record], features: Any, as_messages: bool, file: Path) -> Any:
    """Write the records to an Arrow file; return the `datasets.Dataset` that is mapped to it."""
    import datasets
    import pyarrow

    with (
        pyarrow.OSFile(str(file), "wb") as sink,
        pyarrow.ipc.new_stream(sink, features.arrow_schema) as writer,
    ):
        for batch in _batches(records):
            rows = [_with_messages(record) for record in batch] if as_messages else batch
            columns = {name: [row.get(name, DEFAULTS.get(name)) for row in rows] for name in features}
            writer.write_table(datasets.Dataset.from_dict(columns, features).data.table)

    with file.open("rb") as stream:
        fingerprint = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=fingerprint)


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    chars = 0
    for record in records:
        batch.append(record)
        chars += sum(map(_count_chars, _texts_of(record)))
        if len(batch) == BATCH_ROWS or chars > BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _count_chars(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _texts_of(record: Record) -> list[Any]:
    """Return the texts of a record: steps are strings, and the others may be messages."""
    texts = [record[name] for name in ROLES if name in record]
    return texts + record.get("responses", []) + record.get("completions", [])


def _with_messages(record: Record) -> Record:
    """Return a record with each text as a list of messages."""
    texts = {name: _to_messages(record[name], role) for name, role in ROLES.items() if name in record}
    if "responses" in record:
        texts["responses"] = [_to_messages(text, "assistant") for text in record["responses"]]
    return record | texts


def _to_messages(text: Any, role: str) -> list[Any]:
    if isinstance(text, list):
        return text
    return [{"role": role, "content": text}] if text else []
