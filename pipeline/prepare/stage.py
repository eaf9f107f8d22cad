"""Convert raw preference data to records.

In: the sources of a config, each in one `format`, with its `columns` mapped. A source is a local file or
folder, a hub dataset, or a built-in world.
Out: `runs/<run>/prepare/` with a `DatasetDict` (train, validation, test) for each kind that has rows.
quarantine.jsonl has {source, line, reason, detail, row} for each row left out, and merged_rows.jsonl for each
row that is a vote on the record of another one. For each source and in total,
kept + merged + quarantined == read. A row that gives several records is kept if one of them is.

Kinds that no source has are derived: comparisons from rankings (every strictly ordered pair), demonstrations
from chosen and best-ranked responses, prompts from all kinds.
A wrong row is quarantined; `pipeline.data.validation` lists the reasons. A source that cannot be read, a
missing column, or a source without one valid row raises `UserError`; the published artifact then stays as
it was.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.artifacts import hub
from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import open_external, open_hub
from pipeline.artifacts.manifest import read_manifest
from pipeline.config import PrepareStage, Source
from pipeline.config.importing import import_function
from pipeline.data.labels import class_names, merged_spellings
from pipeline.data.mapping import SIGNATURE
from pipeline.data.notes import reading_notes, unread_parts_note
from pipeline.data.quarantine import count_and_quarantine, count_left_out, row_outcomes
from pipeline.data.readers import ParsedRecord, read_source
from pipeline.data.schema import KINDS, SPLITS, RawRow, Record
from pipeline.data.shelf import View
from pipeline.data.sources import describe_reading, source_files
from pipeline.data.validation import clean_records, compare_records
from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.errors import UserError
from pipeline.prepare import demo, sums
from pipeline.prepare.column_types import column_types
from pipeline.prepare.derived import derive_kinds
from pipeline.prepare.saving import RecordsByKind, Survey, save_kind
from pipeline.prepare.splits import assign_splits, narrow_splits, split_group

# Faults that depend on other sources too.
CROSS_RECORD = ("duplicate", "contradiction", "held-out", "merged", "tie")
WORLDS = {"demo": demo.rows, "sums": sums.rows}
TRAINING_KINDS = ("demonstrations", "comparisons", "prompts")  # later stages train on these


def check(config: PrepareStage) -> None:
    """Refuse a source inside the folder that this run replaces, or a `map` that is no function.

    Raises `UserError`.
    """
    folder = config.folder.resolve()
    for source in config.source:
        if source.map:
            import_function(source.map, SIGNATURE)
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

    maps = {source.map: _map_file(source.map) for source in config.source if source.map}
    inputs |= {spec: open_external(file, "source") for spec, file in maps.items() if file}

    folder = build_artifact(
        config,
        kind="records",
        inputs=inputs,
        make=lambda output, _: _build_records(config, output),
    )
    if is_main_process():
        _log_counts(config, folder)
    return folder


def _map_file(spec: str) -> str | None:
    """Return the file of a `source.map`, or None if its module has none: if it changes, the records may."""
    import_function(spec, SIGNATURE)
    return getattr(sys.modules[spec.partition(":")[0]], "__file__", None)


def _log_counts(config: PrepareStage, folder: Path) -> None:
    """Print how many rows were kept, why others were quarantined, and which files were skipped."""
    rows = read_manifest(folder)["rows"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in rows["quarantined"].items())
    quarantined = f"; quarantined: {reasons}; see {folder}/quarantine.jsonl" if reasons else ""
    merged = f", {rows['merged']:,} merged with others as votes" if rows["merged"] else ""
    print(f"  {rows['kept']:,} of {rows['read']:,} rows kept{merged}{quarantined}")
    if note := unread_parts_note(rows["quarantined"]):
        print(f"  {note}")
    if parts := rows.get("left_out"):
        counts = ", ".join(f"{reason} {count:,}" for reason, count in parts.items())
        print(f"  left out of these: {counts}")

    for source in config.source:
        for line in describe_reading(source):
            print(f"  {source.path}: {line}")


def _resolve_revision(source: Source) -> Source:
    """Return a hub source at the commit of its revision."""
    if not source.hub:
        return source
    commit = broadcast(hub.resolve_commit(source.hub, source.revision, "dataset"))
    return source.model_copy(update={"revision": commit})


def read(source: Source, seed: int, folder: Path | None = None) -> list[ParsedRecord]:
    """Read a source of any format, with temporary files in `folder`; `seed` generates a world."""
    if source.format not in WORLDS:
        return read_source(source, folder)

    generated = enumerate(islice(WORLDS[source.format](source, seed), source.limit), 1)
    return [
        ParsedRecord(kind, record, [RawRow(source.format, number, record)])
        for number, (kind, record) in generated
    ]


def read_records(config: PrepareStage, folder: Path | None = None) -> tuple[list[ParsedRecord], list[str]]:
    """Read and validate all sources, with temporary files in `folder`, and print how they were read.

    Returns the records, of which those that are not kept have a fault, and the classes of labels.
    Raises `UserError` if a source has no valid row.
    """
    items_by_source = [read(source, config.seed, folder) for source in config.source]
    items = [item for source_items in items_by_source for item in source_items]
    labels = [item.record.get("label") for item in items if item.kind == "labels"]
    classes = class_names(config.source, labels)
    _print_notes(config, items_by_source, labels)
    clean_records(items, classes)
    if any(item.splits != SPLITS for item in items):
        narrow_splits((item for item in items if not item.fault), config.seed)
    compare_records(items, classes, config.ties)

    nothing_kept = all(item.fault for item in items)
    for source, source_items in zip(config.source, items_by_source, strict=True):
        _require_valid_rows(source, source_items, CROSS_RECORD if not nothing_kept else ())
    return items, classes


def _build_records(config: PrepareStage, output: Path) -> dict[str, Any]:
    """Write the records and the quarantine to `output`; return the row counts and the metrics."""
    items, classes = read_records(config, output)
    rows = count_and_quarantine(row_outcomes(items), output / "quarantine.jsonl")
    if left_out := count_left_out(items):
        rows["left_out"] = dict(sorted(left_out.items()))

    kept = [item for item in items if not item.fault]
    others = {"prompts": column_types(item for item in kept if KINDS[item.kind].keeps_columns)}
    records = _view_kinds(kept)
    derived = derive_kinds(records, output)
    split_of = assign_splits(narrow_splits(kept, config.seed), config.splits.model_dump())

    metrics: dict[str, int] = {}
    for kind, records_of_kind in sorted({**records, **derived}.items()):
        survey = Survey(kind)
        parts = _split_records(records_of_kind, split_of, config.seed, survey)
        metrics |= {f"{kind}.{split}": len(part) for split, part in parts.items()}
        save_kind(parts, survey, classes, others.get(kind, {}), output / kind)
    return {
        "rows": rows | {"derived": {kind: len(derived_records) for kind, derived_records in derived.items()}},
        "metrics": metrics,
    }


def _print_notes(config: PrepareStage, items_by_source: list[list[ParsedRecord]], labels: list[Any]) -> None:
    """Print what was not read, what became a turn, and which labels are one class in several spellings."""
    for source, items in zip(config.source, items_by_source, strict=True):
        for note in reading_notes(source, items) if source.format not in WORLDS else ():
            print(f"  {note}")
    if not any(source.classes for source in config.source):
        for merged in merged_spellings(labels):
            print(f"  labels: one class in several spellings: {merged}")


def _view_kinds(items: list[ParsedRecord]) -> RecordsByKind:
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        places[item.kind].append(place)
    return {kind: View(lambda place: items[place].record, numbers) for kind, numbers in places.items()}


def _require_valid_rows(
    source: Source, items: list[ParsedRecord], ignored_reasons: tuple[str, ...] = ()
) -> None:
    """Raise `UserError` if a source has no valid row, which means that its config is wrong.

    Rows quarantined for one of `ignored_reasons` count as valid.
    """
    if not all(item.fault and item.fault.reason not in ignored_reasons for item in items):
        return

    name = source.path or source.hub or source.format
    if not items:
        raise UserError(f"{name}: holds no rows; check path, subset and split of the source")

    faulty = [(row.source, row.line, fault) for row, fault in row_outcomes(items) if fault]
    counts = Counter(fault.reason for *_, fault in faulty)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    file, line, fault = min(faulty, key=lambda entry: entry[:2])
    raise UserError(
        f"{name}: of {len(faulty)} rows none can be kept ({reasons}); {file}:{line}: {fault.detail}; "
        "check path, format and columns of the source"
    )


def _split_records(
    records: Sequence[Record], split_of: dict[bytes, str], seed: int, survey: Survey
) -> RecordsByKind:
    """Return {split: records}, and add each record to the survey.

    Raises `UserError` if a kind to train on has no training records.
    """
    places: dict[str, list[int]] = {split: [] for split in SPLITS}
    for place, record in enumerate(records):
        places[split_of[split_group(record, seed)]].append(place)
        survey.add(record)
    if survey.kind in TRAINING_KINDS and not places["train"]:
        raise UserError(
            f"prepare: all {len(records)} {survey.kind} are held out, none is left to train on; "
            "give more prompts, or lower 'splits'"
        )
    return {split: View(records.__getitem__, numbers) for split, numbers in places.items()}
