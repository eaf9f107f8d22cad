"""prepare: raw preference data in, records out.

In: the sources of a config, each in one `format`, its `columns` mapped: local files or folders, hub datasets, the demo world.
Out: `runs/<run>/prepare/` with a `DatasetDict` (train, validation, test) for each kind that has rows, and quarantine.jsonl with
{source, line, reason, detail, row} for each row left out: kept + quarantined == read, for each source and in total.
Kinds that no source gives are derived: comparisons from rankings (every strictly ordered pair), demonstrations from chosen and
best-ranked answers, prompts from all kinds.
A wrong row is quarantined (`checks` lists the reasons). A source that cannot be read, a missing column, or not one row worth
keeping is a `UserError`, and what was published before stays.
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
from pipeline.data.quarantine import count_and_quarantine
from pipeline.data.readers import READERS, ParsedRecord, RawRow, read_source, skipped_files, source_files
from pipeline.data.schema import ROLES, Record
from pipeline.data.validation import class_names, ordered_pairs, record_identity, validate_records
from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.errors import UserError
from pipeline.prepare import demo, splits

ABSENT = {"margin": 0.0}  # where other rows have one; a loss without a margin is one with margin 0

CROSS_RECORD = ("duplicate", "contradiction")  # faults that lie in another source as much

TRAINED = ("demonstrations", "comparisons", "prompts")  # what a later stage learns from


def check(config: PrepareStage) -> None:
    """Refuse a source that this run would replace. Raises `UserError`."""
    for source in config.source:
        if source.path and config.folder.resolve() in [
            Path(source.path).resolve(),
            *Path(source.path).resolve().parents,
        ]:
            raise UserError(
                f"{source.path}: lies in {config.folder}, which this run replaces; move it elsewhere first"
            )


def run(config: PrepareStage) -> Path:
    """Read, check, split and publish; returns the artifact's folder. Local files count by their content, a hub dataset by its revision."""
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
        config, kind="records", inputs=inputs, make=lambda output, _: _make(config, output)
    )
    if is_main_process():
        _log_counts(config, folder)
    return folder


def _log_counts(config: PrepareStage, folder: Path) -> None:
    """What was kept, and what was not."""
    rows = read_manifest(folder)["rows"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in rows["quarantined"].items())
    quarantined = f"; quarantined: {reasons}; see {folder}/quarantine.jsonl" if reasons else ""
    print(f"  {rows['kept']:,} of {rows['read']:,} rows kept{quarantined}")
    for source in config.source:
        if names := skipped_files(source):
            print(f"  {source.path}: passed over {', '.join(names)}; expected {', '.join(READERS)}")


def _resolve_revision(source: Source) -> Source:
    """A hub source at the commit that its revision stands for."""
    return (
        source.model_copy(
            update={"revision": broadcast(hub.resolve_commit(source.hub, source.revision, "dataset"))}
        )
        if source.hub
        else source
    )


def read(source: Source, seed: int) -> list[ParsedRecord]:
    """Read a source of any format; the demo world is generated from `seed`."""
    if source.format != "demo":
        return read_source(source)
    generated = enumerate(islice(demo.rows(source, seed), source.limit), 1)
    return [
        ParsedRecord(kind, record, [RawRow("demo", number, record)]) for number, (kind, record) in generated
    ]


def _make(config: PrepareStage, output: Path) -> dict[str, Any]:
    of_source = [read(source, config.seed) for source in config.source]
    items = [item for found in of_source for item in found]
    classes = class_names(config.source, items)
    validate_records(items, classes)
    nothing_kept = all(item.fault for item in items)
    for source, found in zip(config.source, of_source, strict=True):
        _require_valid_rows(source, found, CROSS_RECORD if not nothing_kept else ())
    rows = count_and_quarantine(
        [(row, item.fault) for item in items for row in item.rows], output / "quarantine.jsonl"
    )
    given: dict[str, list[Record]] = defaultdict(list)
    for item in items:
        if not item.fault:
            given[item.kind].append(item.record)
    derived = _derive(given)
    split_of = splits.assign_splits(
        map(splits.split_key, _all(given)), config.splits.model_dump(), config.seed
    )
    metrics: dict[str, int] = {}
    for kind, records in sorted({**given, **derived}.items()):
        parts = {
            split: [record for record in records if split_of[splits.split_key(record)] == split]
            for split in splits.SPLITS
        }
        if kind in TRAINED and not parts["train"]:
            raise UserError(
                f"prepare: all {len(records)} {kind} are held out, none is left to train on; give more prompts, or lower 'splits'"
            )
        metrics |= {f"{kind}.{split}": len(part) for split, part in parts.items()}
        _save(parts, classes, output / kind)
    return {
        "rows": rows | {"derived": {kind: len(records) for kind, records in derived.items()}},
        "metrics": metrics,
    }


def _require_valid_rows(source: Source, items: list[ParsedRecord], pardoned: tuple[str, ...] = ()) -> None:
    """Raises `UserError` where a source has no row worth keeping: it is not what its config says."""
    if all(item.fault and item.fault.reason not in pardoned for item in items):
        where = source.path or source.hub or source.format
        faulty = sorted((*row[:2], item.fault) for item in items if item.fault for row in item.rows)
        if not faulty:
            raise UserError(f"{where}: holds no rows; check path, subset and split of the source")
        reasons = ", ".join(
            f"{reason} {count}"
            for reason, count in sorted(Counter(fault.reason for *_, fault in faulty).items())
        )
        name, line, fault = faulty[0]
        raise UserError(
            f"{where}: of {len(faulty)} rows none can be kept ({reasons}); {name}:{line}: {fault.detail}; "
            "check path, format and columns of the source"
        )


def _derive(given: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """The kinds that no source gave, each record once."""
    comparisons, rankings = given.get("comparisons", []), given.get("rankings", [])
    chosen = [(record["prompt"], record["chosen"]) for record in comparisons]
    best = [
        (r["prompt"], r["responses"][i])
        for r in rankings
        for i, rank in enumerate(r["ranks"])
        if rank == min(r["ranks"])
    ]
    pairs = [(record["prompt"], *pair) for record in rankings for pair in ordered_pairs(record)]
    made: dict[str, list[Record]] = {
        "comparisons": [
            {"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in pairs
        ],
        "demonstrations": [{"prompt": prompt, "completion": answer} for prompt, answer in chosen + best],
        "prompts": [{"prompt": record["prompt"]} for record in _all(given) if record["prompt"]],
    }
    return {kind: _distinct(kind, records) for kind, records in made.items() if records and kind not in given}


def _distinct(kind: str, records: list[Record]) -> list[Record]:
    first: dict[Hashable, Record] = {}
    for record in records:
        first.setdefault(record_identity(kind, record), record)
    return list(first.values())


def _all(records: dict[str, list[Record]]) -> list[Record]:
    return [record for kind in records.values() for record in kind]


def _save(parts: dict[str, list[Record]], classes: list[str], folder: Path) -> None:
    """Save the splits of one kind as a `DatasetDict`. A column has one type: where any text is messages, all of them become messages."""
    import datasets

    datasets.disable_progress_bars()
    records = _all(parts)
    messages = any(isinstance(text, list) for record in records for text in _texts(record))
    string = datasets.Value("string")
    text = datasets.List({"role": string, "content": string}) if messages else string
    types = {
        **dict.fromkeys(ROLES, text),
        "responses": datasets.List(text),
        "ranks": datasets.List(datasets.Value("int64")),
        "label": datasets.ClassLabel(names=classes),
        "rating": datasets.Value("float64"),
        "margin": datasets.Value("float64"),
        "source": string,
    }
    features = datasets.Features(
        {name: types[name] for name in dict.fromkeys(name for record in records for name in record)}
    )
    saved = datasets.DatasetDict()
    for split, part in parts.items():
        rows = [_as_messages(record) for record in part] if messages else part
        saved[split] = datasets.Dataset.from_dict(
            {name: [row.get(name, ABSENT.get(name)) for row in rows] for name in features}, features
        )
    # An empty split would get no shard at all, and could not be loaded again.
    saved.save_to_disk(str(folder), num_shards={split: 1 for split, part in parts.items() if not part})


def _texts(record: Record) -> list[Any]:
    return [record[name] for name in ROLES if name in record] + record.get("responses", [])


def _as_messages(record: Record) -> Record:
    texts = {name: _messages(record[name], role) for name, role in ROLES.items() if name in record}
    lists = (
        {"responses": [_messages(text, "assistant") for text in record["responses"]]}
        if "responses" in record
        else {}
    )
    return record | texts | lists


def _messages(text: Any, role: str) -> list[Any]:
    if isinstance(text, list):
        return text
    return [{"role": role, "content": text}] if text else []
