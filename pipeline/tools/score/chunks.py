"""Compute and write the columns of a job's rows, chunk by chunk; an interrupted run resumes.

While the output is written, there are also:

    .OUTPUT.partial.jsonl   the settings, then a line for each computed chunk, to resume from
    .OUTPUT.lock            one writer at a time
    .OUTPUT.tmp             the output, until it is complete
    .OUTPUT.quarantine.tmp  its quarantine, until it is complete

A file of one of these names that this command did not write, or a link, is refused and left as it is.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import hash_file, hold_lock, sync_to_disk
from pipeline.artifacts.inputs import open_external
from pipeline.artifacts.manifest import RESULTS_VERSION
from pipeline.data.quarantine import write_quarantine
from pipeline.data.readers import ParsedRecord
from pipeline.distributed.processes import is_main_process, map_across_processes, on_main_process, world_size
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError
from pipeline.tools.score.done import Done, quarantine_file, read_done, write_done
from pipeline.tools.score.encoders import Columns, encode_output
from pipeline.tools.score.job import ScoringJob

HEAD = b'{"command": '  # a partial file begins with it
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

    def begin() -> list[Columns] | None:
        stack.enter_context(_locked(job.output))
        _check_names(job)
        if _is_done(job, settings):
            partial.unlink(missing_ok=True)
            print(f"{job.command}: unchanged, keeping {job.output}", flush=True)
            return None
        done = _resume(job, partial, settings)
        if done:
            progress = f"{len(done):,} of {len(rows):,} rows are done"
            print(f"{job.command}: resuming {partial}: {progress}", flush=True)
        return done

    with ExitStack() as stack:
        done = on_main_process(begin)
        if done is None:
            return
        with progress_bar(job.command, "rows", total=len(rows), initial=len(done)) as bar:
            for start in range(len(done), len(rows), chunk):
                columns = map_across_processes(compute, rows[start : start + chunk])
                done += _append(partial, columns) if is_main_process() else columns
                bar.update(len(done) - start)
        if not is_main_process():
            return
        publish(job, done, settings)
        partial.unlink()
    _print_outcome(job)


def partial_file(job: ScoringJob) -> Path:
    """Return the file of what is computed until the output is complete."""
    return _sibling(job.output, "partial.jsonl")


def _print_outcome(job: ScoringJob) -> None:
    reasons = Counter(item.fault.reason for item in job.items if item.fault)
    if reasons:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
        print(f"  quarantined: {counts}; see {quarantine_file(job.output)}")
    print(f"{len(job.valid):,} rows written, {reasons.total():,} quarantined: {job.output}", flush=True)


def _check_names(job: ScoringJob) -> None:
    """Raise `UserError` if somebody else made a file of the names that are used while the output is written.

    A partial file begins with the settings. The others are this command's if there is such a partial file.
    """
    partial = _sibling(job.output, "partial.jsonl")
    with suppress(FileNotFoundError):
        head = partial.read_bytes()[: len(HEAD)]
        if partial.is_symlink() or not HEAD.startswith(head):
            raise UserError(f"{partial}: is not what {job.command} left there; move it away")
        return
    for path in (partial, *_temporaries(job.output)):
        if os.path.lexists(path):
            raise UserError(f"{path}: is not what {job.command} left there; move it away")


def _is_done(job: ScoringJob, settings: dict[str, Any]) -> bool:
    """Return whether the output is there already. Raises `UserError` if it has other settings."""
    if job.force or not job.output.exists():
        return False
    done = read_done(job.output)
    if done and done.settings == settings:
        return True
    changed = [key for key in settings if not done or done.settings.get(key, ...) != settings[key]]
    raise UserError(
        f"--output {job.output}: exists already, and was made with another {', '.join(changed)}; "
        "name another file, or add --force to replace it"
    )


def _resume(job: ScoringJob, partial: Path, settings: dict[str, Any]) -> list[Columns]:
    """Return what an interrupted run with the same settings computed, and start the partial file otherwise.

    What follows a torn line is removed from the partial file.
    """
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    head, *parts = _whole_lines(lines) or [{}]
    if head == settings:
        done: list[Columns] = []
        size = len(lines[0])
        for line, part in zip(lines[1:], parts, strict=False):
            if not _is_chunk(job, part) or len(done) + len(part) > len(job.valid):
                break
            done += part
            size += len(line)
        os.truncate(partial, size)
        return done

    if lines:
        changed = [key for key in settings if head.get(key, ...) != settings[key]]
        print(f"{partial}: was made with another {', '.join(changed)}; starting over", flush=True)
    partial.unlink(missing_ok=True)
    _append(partial, settings)
    return []


def _is_chunk(job: ScoringJob, part: Any) -> bool:
    names = set(job.columns)
    return isinstance(part, list) and all(isinstance(row, dict) and row.keys() == names for row in part)


def _whole_lines(lines: list[bytes]) -> list[Any]:
    """Return the values of the lines before the first that is torn."""
    values: list[Any] = []
    for line in lines:
        try:
            values.append(json.loads(line[: line.index(b"\n")]))
        except (ValueError, RecursionError):
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


def _temporaries(output: Path) -> tuple[Path, Path]:
    return _sibling(output, "tmp"), _sibling(output, "quarantine.tmp")


def publish(job: ScoringJob, columns: list[Columns], settings: dict[str, Any]) -> None:
    """Write the quarantine, then the complete output; after a crash the previous output is still there."""
    output, quarantine = _temporaries(job.output)
    for path in (output, quarantine):
        path.unlink(missing_ok=True)
    rows = [item.rows[0].data | new for item, new in zip(job.valid, columns, strict=True)]
    with output.open("xb") as stream:
        stream.write(encode_output(job.output, rows, job.columns, job.source))
    if len(rows) < len(job.items):
        write_quarantine([(item.rows[0], item.fault) for item in job.items], quarantine)
    written = [path for path in (output, quarantine) if path.exists()]
    sync_to_disk(*written)

    write_done(job.output, Done(settings=settings, **_hashes(written)))
    if quarantine in written:
        os.replace(quarantine, quarantine_file(job.output))
    else:
        quarantine_file(job.output).unlink(missing_ok=True)  # belongs to the output that is replaced
    os.replace(output, job.output)
    sync_to_disk(job.output.parent)


def _hashes(written: list[Path]) -> dict[str, str]:
    return dict(zip(("output", "quarantine"), map(hash_file, written), strict=False))
