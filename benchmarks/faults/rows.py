"""Prepare and score files of mutated rows: each row is kept, merged or quarantined, or the file refused."""

import copy
import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.faults.cases import Case, Outcome, Section
from benchmarks.faults.mutations import MESSAGES, NOT_TEXT, Random, change_bytes, mutate_value, to_json
from benchmarks.faults.processes import run_child, scratch_copy
from benchmarks.faults.world import RUN, World

Row = dict[str, Any]
ROWS = (20, 60)  # of a file
MUTATED = (0.03, 0.4)  # share of the rows of a file
RECORDS = f"{RUN}/prepare"
SCORED = ("scored.jsonl", "scored.jsonl.quarantine.jsonl")


def _dialogue(answer: str, number: int) -> str:
    return f"\n\nHuman: Question {number}?\n\nAssistant: {answer} {number}"


FORMATS: dict[str, tuple[str, Callable[[int], Row]]] = {
    "comparisons": (
        "comparisons",
        lambda n: {"prompt": f"Q{n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."},
    ),
    "comparisons of messages": (
        "comparisons",
        lambda n: {
            "prompt": [{"role": "user", "content": f"Q{n}?"}],
            "chosen": [{"role": "assistant", "content": f"Yes {n}."}],
            "rejected": [{"role": "assistant", "content": f"No {n}."}],
        },
    ),
    "dialogues": ("dialogues", lambda n: {"chosen": _dialogue("Yes", n), "rejected": _dialogue("No", n)}),
    "rankings": (
        "rankings",
        lambda n: {"prompt": f"Q{n}?", "responses": [f"A{n}", f"B{n}", f"C{n}"], "ranks": [1, 2, 2]},
    ),
    "rankings by row": (
        "rankings",
        lambda n: {"prompt": f"Q{n // 3}?", "response": f"A{n}", "rank": n % 3 + 1},
    ),
    "labels": ("labels", lambda n: {"prompt": f"Q{n}?", "completion": f"A{n}", "label": n % 2 == 0}),
    "ratings": ("ratings", lambda n: {"prompt": f"Q{n}?", "completion": f"A{n}", "rating": n / 4}),
    "demonstrations": ("demonstrations", lambda n: {"prompt": f"Q{n}?", "completion": f"A{n}"}),
    "conversations": (
        "demonstrations",
        lambda n: {"messages": [*MESSAGES, {"role": "user", "content": f"Q{n}?"}, MESSAGES[1]]},
    ),
    "prompts": ("prompts", lambda n: {"prompt": f"Q{n}?", "topic": f"T{n}"}),
    "answers": ("score", lambda n: {"prompt": f"Q{n}?", "response": f"A{n}", "id": n}),
}
TEXTS = ("prompt", "chosen", "rejected", "completion", "response")  # columns of one text each


def _csv(rows: list[Any], delimiter: str = ",") -> bytes:
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        values = [row.get(name) for name in names] if isinstance(row, dict) else [row]
        writer.writerow(
            [value if isinstance(value, str | int | float) else to_json(value) for value in values]
        )
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _json_lines(rows: list[Any]) -> bytes:
    return "".join(to_json(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _columns(rows: list[Any]) -> dict[str, Any]:
    """Return Arrow columns: of the values' own type or, if they have several, of JSON as text."""
    import pyarrow

    names = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) if isinstance(row, dict) else None for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, ValueError):
            texts = [value if isinstance(value, str) else to_json(value) for value in values]
            columns[name] = pyarrow.array([text.encode(errors="replace").decode() for text in texts])
    return columns


def _write_parquet(rows: list[Any], file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(_columns(rows)), file)


def _save_to_disk(rows: list[Any], folder: Path) -> None:
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    datasets.Dataset(pyarrow.table(_columns(rows))).save_to_disk(str(folder))


TYPES: dict[str, Callable[[list[Any], Path], Any]] = {
    "rows.csv": lambda rows, file: file.write_bytes(_csv(rows)),
    "rows.tsv": lambda rows, file: file.write_bytes(_csv(rows, "\t")),
    "rows.jsonl": lambda rows, file: file.write_bytes(_json_lines(rows)),
    "rows.json": lambda rows, file: file.write_bytes(b"[" + b",".join(_json_lines(rows).splitlines()) + b"]"),
    "lines.json": lambda rows, file: file.write_bytes(_json_lines(rows)),
    "rows.jsonl.gz": lambda rows, file: file.write_bytes(gzip.compress(_json_lines(rows), mtime=0)),
    "rows.parquet": _write_parquet,
    "saved": _save_to_disk,
}
NOT_ROWS = [[], [1, 2], "text", 5, None, True, {}]


def plan(world: World) -> list[tuple[str, str, str]]:
    """Every format in every type of file, with mutated rows, mutated bytes, or text that is none."""
    tries = product(FORMATS, TYPES, ("rows", "rows", "bytes", "not text"))
    return [what for what in tries if what[:2] != ("answers", "saved")]


def mutate_rows(rows: list[Row], kind: str, rng: Random) -> list[Any]:
    """Return the rows, a part of them mutated: a value, the row itself, or a text that is none."""
    mutated: list[Any] = []
    share = rng.choice(MUTATED)
    for row in rows:
        mutated.append(row)
        if rng.random() > share:
            continue
        texts = [name for name in TEXTS if isinstance(row.get(name), str)]
        if kind == "not text" and texts:
            mutated[-1] = row | {rng.choice(texts): rng.choice(list(NOT_TEXT.values()))}
        elif rng.random() < 0.08:
            mutated[-1] = rng.choice(NOT_ROWS)
        elif rng.random() < 0.08:
            mutated.append(copy.deepcopy(row))
        else:
            mutated[-1] = mutate_value(row, rng)[0]
    return mutated


def run(case: Case) -> Outcome:
    """Write a file, prepare or score it, and account for its rows."""
    name, type_, kind = case.what
    format_, make = FORMATS[name]
    rows: list[Any] = [make(number) for number in range(case.random.randint(*ROWS))]
    rows = rows if kind == "bytes" else mutate_rows(rows, kind, case.random)
    argv = _command(format_, type_)
    outcome = Outcome(f"rlhf {' '.join(argv)} ({name}, {kind} mutated)", figures=Counter(files=1))

    def work() -> int:
        from pipeline.cli import main

        TYPES[type_](rows, Path(type_))
        if kind == "bytes":
            _change_file(Path(type_), case.random)
        return main(argv)

    names = ["configs", f"{RUN}/reward"] if format_ == "score" else ["configs"]
    with scratch_copy(case.folder, case.world.folder, names) as folder:
        result = outcome.saw(run_child(work, folder, timeout=120))
        if result.code == 0:
            written = len(rows) if kind != "bytes" else None
            (_account_scores if format_ == "score" else _account)(outcome, folder, written)
            if kind == "not text" and format_ != "score" and type_.endswith((".csv", ".tsv", ".parquet")):
                _expect_not_learned(outcome, folder)
        elif not result.tracebacks:
            outcome.expect(result.is_refusal, f"{type_}: {result.summary}")
            is_total = type_ == "rows.jsonl" and kind != "bytes" and format_ != "labels"
            outcome.expect(not is_total, f"one row ends the file: {result.summary}")
            outcome.figures["refused"] += 1
    return outcome


def _command(format_: str, type_: str) -> list[str]:
    if format_ == "score":
        return ["score", "--reward", f"{RUN}/reward", "--input", type_, "--output", SCORED[0]]
    source = f"source={{format: {format_}, path: {type_}}}"
    return ["prepare", "--config", "configs/prepare.yaml", "--run", "world", source]


def _change_file(path: Path, rng: Random) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    file = rng.choice(files)
    file.write_bytes(change_bytes(file.read_bytes(), rng)[0])


def _account(outcome: Outcome, folder: Path, written: int | None) -> None:
    """Expect that read is kept, merged and quarantined rows together, and all that was written."""
    rows = json.loads((folder / RECORDS / "manifest.json").read_text())["rows"]
    merged = rows.get("merged", 0)
    merged = sum(merged.values()) if isinstance(merged, dict) else merged
    quarantined = sum(rows["quarantined"].values())
    lines = (folder / RECORDS / "quarantine.jsonl").read_text().splitlines()
    told = f"read {rows['read']}, kept {rows['kept']}, merged {merged}, quarantined {quarantined}"
    outcome.expect(rows["read"] == rows["kept"] + merged + quarantined, f"not accounted for: {told}")
    outcome.expect(len(lines) == quarantined, f"{len(lines)} lines of quarantine: {told}")
    outcome.expect(written in (None, rows["read"]), f"of {written} rows written: {told}")
    outcome.figures["read"] += rows["read"]


def _account_scores(outcome: Outcome, folder: Path, written: int | None) -> None:
    """Expect each row in the output or in its quarantine."""
    scored, quarantined = (
        len((folder / name).read_text().splitlines()) if (folder / name).exists() else 0 for name in SCORED
    )
    told = f"scored {scored}, quarantined {quarantined}"
    outcome.expect(written in (None, scored + quarantined), f"of {written} rows written: {told}")
    outcome.figures["read"] += scored + quarantined


def _expect_not_learned(outcome: Outcome, folder: Path) -> None:
    """Expect that no text of the records is one in which there is nothing to learn."""
    result = run_child(lambda: print(json.dumps(list(_texts_learned(folder / RECORDS)))), folder)
    learned = set(json.loads(result.out))
    for name, text in NOT_TEXT.items():
        outcome.expect(text not in learned, f"learned as text: {name}")


def _texts_learned(artifact: Path) -> Iterator[str]:
    """Yield every text of the records, those in messages too."""
    import datasets

    for kind in sorted(path.parent for path in artifact.glob("*/dataset_dict.json")):
        for split in datasets.load_from_disk(str(kind)).values():
            for row in split:
                yield from _texts_in({key: value for key, value in row.items() if key != "source"})


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


SECTION = Section(
    "rows", plan, run, "{read} rows accounted for in {files} files, {refused} refused", full=640, short=60
)
