"""Convert raw preference data to records.

In: the sources of a config, each in one `format`, with its `columns` mapped. A source is a local file or
folder, a hub dataset, or the demo world.
Out: `runs/<run>/prepare/` with a `DatasetDict` (train, validation, test) for each kind that has rows.
quarantine.jsonl has {source, line, reason, detail, row} for each row left out. For each source and in total,
kept + quarantined == read.

Kinds that no source has are derived: comparisons from rankings (every strictly ordered pair), demonstrations
from chosen and best-ranked responses, prompts from all kinds.
A wrong row is quarantined; `pipeline.data.validation` lists the reasons. A source that cannot be read, a
missing column, or a source without one valid row raises `UserError`; the published artifact then stays as
it was.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.artifacts import hub
from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import open_external, open_hub
from pipeline.artifacts.manifest import read_manifest
from pipeline.config import PrepareStage, Source
from pipeline.data.files import READERS
from pipeline.data.labels import class_names, merged_spellings
from pipeline.data.notes import reading_notes
from pipeline.data.quarantine import count_and_quarantine
from pipeline.data.readers import ParsedRecord, read_source
from pipeline.data.schema import ROLES, SPLITS, RawRow, Record
from pipeline.data.sources import skipped_files, source_files
from pipeline.data.validation import ordered_pairs, record_identity, validate_records
from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.errors import UserError
from pipeline.prepare import demo
from pipeline.prepare.splits import assign_records, split_key

DEFAULTS = {
    "margin": 0.0
}  # for rows without the column if others have it; a margin of 0 is no margin in the loss
CROSS_RECORD = ("duplicate", "contradiction")  # faults that depend on other sources too
TRAINING_KINDS = ("demonstrations", "comparisons", "prompts")  # later stages train on these

RecordsByKind = dict[str, list[Record]]


def check(config: PrepareStage) -> None:
    """Refuse a source inside the folder that this run replaces. Raises `UserError`."""
    folder = config.folder.resolve()
    for source in config.source:
        if not source.path:
            continue
        path = Path(source.path).resolve()
        if folder in [path, *path.parents]:
            raise UserError(
                f"{source.path}: is inside {config.folder}, which this run replaces; move it elsewhere first"
            )


def run(config: PrepareStage) -> Path:
    """Read, validate, split and publish the records; return the artifact's folder.

    The content of local files, and the commit of a hub dataset, identify the inputs.
    """
    check(config)
    config = config.model_copy(update={"source": [_resolve_revision(source) for source in config.source]})
    inputs = {
        path.as_posix(): open_external(path, "source")
        for source in config.source
        for path in source_files(source)
    }
    inputs |= {
        source.hub: open_hub(source.hub, "source", source.revision) for source in config.source if source.hub
    }

    folder = build_artifact(
        config,
        kind="records",
        inputs=inputs,
        make=lambda output, _: _build_records(config, output),
    )
    if is_main_process():
        _log_counts(config, folder)
    return folder


def _log_counts(config: PrepareStage, folder: Path) -> None:
    """Print how many rows were kept, why others were quarantined, and which files were skipped."""
    rows = read_manifest(folder)["rows"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in rows["quarantined"].items())
    quarantined = f"; quarantined: {reasons}; see {folder}/quarantine.jsonl" if reasons else ""
    print(f"  {rows['kept']:,} of {rows['read']:,} rows kept{quarantined}")

    for source in config.source:
        if names := skipped_files(source):
            print(f"  {source.path}: skipped {', '.join(names)}; expected {', '.join(READERS)}")


def _resolve_revision(source: Source) -> Source:
    """Return a hub source at the commit of its revision."""
    if not source.hub:
        return source
    commit = broadcast(hub.resolve_commit(source.hub, source.revision, "dataset"))
    return source.model_copy(update={"revision": commit})


def read(source: Source, seed: int) -> list[ParsedRecord]:
    """Read a source of any format; the demo world is generated from `seed`."""
    if source.format != "demo":
        return read_source(source)

    generated = enumerate(islice(demo.rows(source, seed), source.limit), 1)
    return [
        ParsedRecord(kind, record, [RawRow("demo", number, record)]) for number, (kind, record) in generated
    ]


def _build_records(config: PrepareStage, output: Path) -> dict[str, Any]:
    """Write the records and the quarantine to `output`; return the row counts and the metrics."""
    items_by_source = [read(source, config.seed) for source in config.source]
    items = [item for source_items in items_by_source for item in source_items]
    labels = [item.record.get("label") for item in items if item.kind == "labels"]
    classes = class_names(config.source, labels)
    _print_notes(config, items_by_source, labels)
    validate_records(items, classes)

    nothing_kept = all(item.fault for item in items)
    for source, source_items in zip(config.source, items_by_source, strict=True):
        _require_valid_rows(source, source_items, CROSS_RECORD if not nothing_kept else ())
    rows = count_and_quarantine(
        [(row, item.fault) for item in items for row in item.rows], output / "quarantine.jsonl"
    )

    records: RecordsByKind = defaultdict(list)
    for item in items:
        if not item.fault:
            records[item.kind].append(item.record)
    derived = _derive_kinds(records)
    split_of = assign_records(_flatten(records), config.splits.model_dump(), config.seed)

    metrics: dict[str, int] = {}
    for kind, records_of_kind in sorted({**records, **derived}.items()):
        parts = _split_records(kind, records_of_kind, split_of)
        metrics |= {f"{kind}.{split}": len(part) for split, part in parts.items()}
        _save_kind(parts, classes, output / kind)
    return {
        "rows": rows | {"derived": {kind: len(derived_records) for kind, derived_records in derived.items()}},
        "metrics": metrics,
    }


def _print_notes(config: PrepareStage, items_by_source: list[list[ParsedRecord]], labels: list[Any]) -> None:
    """Print what was not read, what became a turn, and which labels are one class in several spellings."""
    for source, items in zip(config.source, items_by_source, strict=True):
        for note in reading_notes(source, items) if source.format != "demo" else ():
            print(f"  {note}")
    if not any(source.classes for source in config.source):
        for merged in merged_spellings(labels):
            print(f"  labels: one class in several spellings: {merged}")


def _require_valid_rows(
    source: Source, items: list[ParsedRecord], ignored_reasons: tuple[str, ...] = ()
) -> None:
    """Raise `UserError` if a source has no valid row, which means that its config is wrong.

    Rows quarantined for one of `ignored_reasons` count as valid.
    """
    if not all(item.fault and item.fault.reason not in ignored_reasons for item in items):
        return

    name = source.path or source.hub or source.format
    faulty = sorted((*row[:2], item.fault) for item in items if item.fault for row in item.rows)
    if not faulty:
        raise UserError(f"{name}: holds no rows; check path, subset and split of the source")

    counts = Counter(fault.reason for *_, fault in faulty)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    file, line, fault = faulty[0]
    raise UserError(
        f"{name}: of {len(faulty)} rows none can be kept ({reasons}); {file}:{line}: {fault.detail}; "
        "check path, format and columns of the source"
    )


def _derive_kinds(records: RecordsByKind) -> RecordsByKind:
    """Return the kinds that no source has, derived from the others; each record once."""
    comparisons, rankings = records.get("comparisons", []), records.get("rankings", [])
    chosen = [(record["prompt"], _first_message(record["chosen"])) for record in comparisons]
    best = [
        (ranking["prompt"], _first_message(response))
        for ranking in rankings
        for response in _best_responses(ranking)
    ]
    pairs = [(ranking["prompt"], *pair) for ranking in rankings for pair in ordered_pairs(ranking)]

    derived: RecordsByKind = {
        "comparisons": [
            {"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in pairs
        ],
        "demonstrations": [{"prompt": prompt, "completion": response} for prompt, response in chosen + best],
        "prompts": [{"prompt": record["prompt"]} for record in _flatten(records) if record["prompt"]],
    }
    return {
        kind: _drop_duplicates(kind, candidates)
        for kind, candidates in derived.items()
        if candidates and kind not in records
    }


def _first_message(response: Any) -> Any:
    """Return what responds to the prompt: of the rest of a conversation, its first message."""
    return response[:1] if isinstance(response, list) else response


def _best_responses(ranking: Record) -> list[Any]:
    best = min(ranking["ranks"])
    return [
        response
        for response, rank in zip(ranking["responses"], ranking["ranks"], strict=True)
        if rank == best
    ]


def _drop_duplicates(kind: str, records: list[Record]) -> list[Record]:
    first: dict[Hashable, Record] = {}
    for record in records:
        first.setdefault(record_identity(kind, record), record)
    return list(first.values())


def _split_records(kind: str, records: list[Record], split_of: dict[str, str]) -> RecordsByKind:
    """Return {split: records}. Raises `UserError` if a kind to train on has no training records."""
    parts = {
        split: [record for record in records if split_of[split_key(record)] == split] for split in SPLITS
    }
    if kind in TRAINING_KINDS and not parts["train"]:
        raise UserError(
            f"prepare: all {len(records)} {kind} are held out, none is left to train on; "
            "give more prompts, or lower 'splits'"
        )
    return parts


def _flatten(records: dict[str, list[Record]]) -> list[Record]:
    return [record for part in records.values() for record in part]


def _save_kind(parts: dict[str, list[Record]], classes: list[str], folder: Path) -> None:
    """Save the splits of one kind as a `DatasetDict`.

    A column has one type, so if any text is a list of messages, all texts become messages.
    """
    import datasets

    datasets.disable_progress_bars()
    records = _flatten(parts)
    as_messages = any(isinstance(text, list) for record in records for text in _texts_of(record))

    string = datasets.Value("string")
    text = datasets.List({"role": string, "content": string}) if as_messages else string
    types = {
        **dict.fromkeys(ROLES, text),
        "responses": datasets.List(text),
        "ranks": datasets.List(datasets.Value("int64")),
        "label": datasets.ClassLabel(names=classes),
        "rating": datasets.Value("float64"),
        "margin": datasets.Value("float64"),
        "source": string,
    }
    columns = dict.fromkeys(name for record in records for name in record)
    features = datasets.Features({name: types[name] for name in columns})

    data = datasets.DatasetDict()
    for split, part in parts.items():
        rows = [_with_messages(record) for record in part] if as_messages else part
        data[split] = datasets.Dataset.from_dict(
            {name: [row.get(name, DEFAULTS.get(name)) for row in rows] for name in features}, features
        )
    # Without num_shards an empty split would get no shard, and could not be loaded again.
    data.save_to_disk(str(folder), num_shards={split: 1 for split, part in parts.items() if not part})


def _texts_of(record: Record) -> list[Any]:
    return [record[name] for name in ROLES if name in record] + record.get("responses", [])


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
