"""Compute and write the columns of a job's rows, chunk by chunk; an interrupted run resumes.

While the output is written, there are also:

    .OUTPUT.partial.jsonl  the settings, then a line for each computed chunk; the same command resumes from it
    .OUTPUT.lock           one writer at a time
    .OUTPUT.tmp            the output, until it is complete
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import hold_lock, sync_to_disk
from pipeline.artifacts.inputs import open_external
from pipeline.artifacts.manifest import RESULTS_VERSION
from pipeline.data.quarantine import write_quarantine
from pipeline.data.readers import ParsedRecord
from pipeline.distributed.processes import is_main_process, map_across_processes, on_main_process, world_size
from pipeline.distributed.progress import progress_bar
from pipeline.tools.score.encoders import Columns, encode_output
from pipeline.tools.score.job import OUTPUT_COLUMNS, ScoringJob

CHUNK = 256  # responses between two writes: the most that an interruption loses

Compute = Callable[[Sequence[ParsedRecord]], list[Columns]]


def score_rows(job: ScoringJob, settings: dict[str, Any], compute: Compute, chunk: int) -> None:
    """Write the valid rows with the columns that `compute` returns; resume an interrupted run.

    Each process computes `chunk` rows at a time, and rank 0 writes. `settings` is all that decides the
    columns. The batch size is not part of it, so that it can be lowered after a run that was out of memory.
    """
    settings = {
        "command": job.command,
        "version": RESULTS_VERSION,
        "input": open_external(job.source, "source").identity,
    } | settings
    partial = partial_file(job)
    rows, chunk = job.valid, chunk * world_size()

    def begin() -> list[Columns]:
        stack.enter_context(_locked(job.output))
        done = _resume(partial, settings)
        if done:
            progress = f"{len(done):,} of {len(rows):,} rows are done"
            print(f"{job.command}: resuming {partial}: {progress}", flush=True)
        return done

    with ExitStack() as stack:
        done = on_main_process(begin)
        with progress_bar(job.command, "rows", total=len(rows), initial=len(done)) as bar:
            for start in range(len(done), len(rows), chunk):
                columns = map_across_processes(compute, rows[start : start + chunk])
                done += _append(partial, columns) if is_main_process() else columns
                bar.update(len(done) - start)
        if not is_main_process():
            return
        publish(job, done)
        partial.unlink()
    _print_outcome(job)


def partial_file(job: ScoringJob) -> Path:
    """Return the file of what is computed until the output is complete."""
    return _sibling(job.output, "partial.jsonl")


def _print_outcome(job: ScoringJob) -> None:
    reasons = Counter(item.fault.reason for item in job.items if item.fault)
    if reasons:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
        print(f"  quarantined: {counts}; see {_quarantine_file(job)}")
    print(f"{len(job.valid):,} rows scored, {reasons.total():,} quarantined: {job.output}", flush=True)


def _resume(partial: Path, settings: dict[str, Any]) -> list[Columns]:
    """Return what an interrupted run with the same settings computed, and start the partial file otherwise.

    A torn last line is removed from the partial file.
    """
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    head, *done = _whole_lines(lines) or [{}]
    if head == settings:
        os.truncate(partial, sum(map(len, lines[: len(done) + 1])))
        return [columns for part in done for columns in part]

    if lines:
        changed = [key for key in settings if head.get(key, ...) != settings[key]]
        print(f"{partial}: was made with another {', '.join(changed)}; starting over", flush=True)
    partial.unlink(missing_ok=True)
    _append(partial, settings)
    return []


def _whole_lines(lines: list[bytes]) -> list[Any]:
    """Return the values of the lines before the first that is torn."""
    values: list[Any] = []
    for line in lines:
        try:
            values.append(json.loads(line[: line.index(b"\n")]))
        except ValueError:
            break
    return values


def _append(partial: Path, value: Any) -> Any:
    with partial.open("ab") as lines:
        lines.write(json.dumps(value).encode() + b"\n")
    sync_to_disk(partial)
    return value


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    lock = _sibling(output, "lock")
    busy = f"--output {output}: is being written by another process; wait until it ends, or name another file"
    with hold_lock(lock, busy):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _sibling(output: Path, suffix: str) -> Path:
    return output.with_name(f".{output.name}.{suffix}")


def _quarantine_file(job: ScoringJob) -> Path:
    return job.output.with_name(f"{job.output.name}.quarantine.jsonl")


def publish(job: ScoringJob, columns: list[Columns]) -> None:
    """Write the quarantine, then the complete output; after a crash the previous output is still there."""
    rows = [item.rows[0].data | new for item, new in zip(job.valid, columns, strict=True)]
    temporary = _sibling(job.output, "tmp")
    temporary.write_bytes(encode_output(job.output, rows, OUTPUT_COLUMNS[job.command], job.source))
    sync_to_disk(temporary)

    _quarantine_file(job).unlink(missing_ok=True)  # belongs to the output that is replaced
    if len(rows) < len(job.items):
        write_quarantine([(item.rows[0], item.fault) for item in job.items], _quarantine_file(job))
    os.replace(temporary, job.output)
    sync_to_disk(job.output.parent)
