"""The rows of a file to score: read, checked, and quarantined if they are wrong. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.config import nearest
from pipeline.data.files import READERS, Reader, find_reader
from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import RowError
from pipeline.data.validation import clean_record, has_lone_surrogate
from pipeline.distributed.processes import is_main_process
from pipeline.errors import UserError
from pipeline.tools.score.done import check_in_the_way
from pipeline.tools.score.encoders import ENCODERS, Columns, encode_output

# Column that a command reads -> kind of record, as pipeline.data.schema names it.
KINDS = {"response": "answers", "completions": "step_answers", "prompt": "prompts"}
OUTPUT_COLUMNS = {"score": ("reward",), "best-of-n": ("response", "reward", "reward_mean")}
STEP_COLUMN = "step_scores"  # `score` also writes it with a stepwise model
# The first that a file has contains the response; `completions` is the list of its steps.
RESPONSE_COLUMNS = ("response", "completion", "text", "completions")


class ScoringJob(NamedTuple):
    """A file to score: an item for each row, whose `record` is what the models read.

    `names` are the columns that the file has, and `columns` those that the command writes.
    """

    command: str
    source: Path
    output: Path
    items: list[ParsedRecord]
    names: list[str]
    columns: tuple[str, ...]
    force: bool = False

    @property
    def valid(self) -> list[ParsedRecord]:
        """The rows without a fault."""
        return [item for item in self.items if not item.fault]

    @property
    def has_steps(self) -> bool:
        """Whether the responses are lists of steps."""
        return any(item.kind == "step_answers" for item in self.items)

    def with_step_scores(self) -> "ScoringJob":
        """Return the job with a column for the scores of the steps. Raises `UserError` if the file has it."""
        _check_free(self.command, self.source, self.names, (STEP_COLUMN,))
        return self._replace(columns=(*self.columns, STEP_COLUMN))


def read_job(
    command: str, source: Path, output: Path, force: bool, columns: tuple[str, ...] = ()
) -> ScoringJob:
    """Read the rows to score; a wrong row is an item with a fault.

    `columns` are those that the command writes (default: its `OUTPUT_COLUMNS`). Raises `UserError` if a
    path or a column is wrong, if no row is valid, or if the output cannot be written.
    """
    rows = list(_check_paths(source, output, force)(source))
    names = list(dict.fromkeys(name for row in rows if not row.fault for name in row.data))
    columns = columns or OUTPUT_COLUMNS[command]
    column = _find_column(command, source, names, columns)

    field = column if column in ("prompt", "completions") else "response"
    items = [ParsedRecord(KINDS[field], {}, [row], row.fault) for row in rows]
    for number, item in enumerate(items):
        if not item.fault:
            data = item.rows[0].data
            try:
                fields = {"prompt": data.get("prompt"), field: data.get(column)}
                item.record = clean_record(item.kind, fields, []) | {"number": number}
            except RowError as fault:
                item.fault = fault

    job = ScoringJob(command, source, output, items, names, columns, force)
    _check_writable(job)
    if not job.valid:
        first = f"; line {items[0].rows[0].line}: {items[0].fault.detail}" if items and items[0].fault else ""
        raise UserError(f"{source}: none of its {len(items)} rows can be read{first}")
    return job


def _check_writable(job: ScoringJob) -> None:
    """Set the fault of rows that the output cannot hold, before any model is loaded.

    Raises `UserError` if it cannot hold the others together.
    """

    def encode(items: list[ParsedRecord]) -> None:
        rows = [item.rows[0].data for item in items]
        encode_output(job.output, rows, job.columns, job.source)

    for item in job.valid:
        if has_lone_surrogate(item.rows[0].data):
            item.fault = RowError("not-unicode", "another column has a name or a text that is not UTF-8")
    try:
        encode(job.valid)
    except UserError:
        for item in job.valid:
            try:
                encode([item])
            except UserError as error:
                item.fault = RowError("not-writable", str(error))
        encode(job.valid)


def _find_column(command: str, source: Path, names: list[str], columns: tuple[str, ...]) -> str:
    """Return the column that the command reads.

    Raises `UserError` if there is none, or if the file has a column that the command would write.
    """
    needed = RESPONSE_COLUMNS if command == "score" else ("prompt",)
    column = next((name for name in needed if name in names), needed[0])
    if names and column not in names:
        hint = nearest(column, names) or "; rename the column that contains it"
        raise UserError(
            f"{source}: {command} needs a column {' or '.join(map(repr, needed))}, "
            f"found {', '.join(names)}{hint}"
        )
    _check_free(command, source, names, columns)
    return column


def _check_free(command: str, source: Path, names: list[str], columns: tuple[str, ...]) -> None:
    """Raise `UserError` if the file has a column that the command would write."""
    if taken := [name for name in columns if name in names]:
        raise UserError(
            f"{source}: already has a column {taken[0]!r}, which {command} would write; rename or remove it"
        )


def _check_paths(source: Path, output: Path, force: bool) -> Reader:
    """Return the reader of the source. Raises `UserError` if a path is wrong."""
    if output.suffix.lower() not in ENCODERS:
        raise UserError(f"--output {output}: expected a name that ends in {', '.join(ENCODERS)}")
    if not source.is_file():
        problem = "is not a file" if source.exists() else "does not exist"
        raise UserError(f"--input {source}: {problem}; expected {', '.join(READERS)}")
    reader = find_reader(source)
    if not reader:
        raise UserError(f"--input {source}: expected a name that ends in {', '.join(READERS)}")
    if output.exists() and (output.is_dir() or output.samefile(source)):
        problem = "is a folder" if output.is_dir() else "is the input"
        raise UserError(f"--output {output}: {problem}; name another file")
    check_in_the_way(output, force)
    return reader


def check_rows(job: ScoringJob, is_overlong: Callable[[Columns], bool], limit: str, overlong: str) -> int:
    """Set the fault of rows that the model refuses, and of overlong ones with `overlong: drop`.

    Prints and returns how many rows are over the `limit`. Raises `UserError` if no row is left.
    """
    count, rows = 0, job.valid
    for item in rows:
        try:
            if is_overlong(item.record):
                count += 1
                if overlong == "drop":
                    item.fault = RowError("overlong", f"over {limit}")
        except UserError as error:
            item.fault = RowError("refused", str(error))
    if count and is_main_process():
        print(f"{job.command}: over {limit} (overlong: {overlong}): {count:,} of {len(rows):,}", flush=True)
    if not job.valid and rows[0].fault:
        line, detail = rows[0].rows[0].line, rows[0].fault.detail
        raise UserError(f"{job.source}: no row is left to {job.command}; line {line}: {detail}")
    return count
