"""`rlhf score`, `best-of-n` and `compare`: score the rows of a file, or rank responses on the terminal.

In: a CSV, TSV, JSON, JSONL or Parquet file.
Out: a CSV, JSONL or Parquet file of the same rows in the same order, with new columns. If rows are wrong,
they are beside it in OUTPUT.quarantine.jsonl, as prepare writes it.
While the output is written, there are also:

    .OUTPUT.partial.jsonl  the settings, then a line for each computed chunk; the same command resumes from it
    .OUTPUT.lock           one writer at a time
    .OUTPUT.tmp            the output, until it is complete

torch is imported only after the files have been checked.
"""

import io
import json
import math
import os
import re
import shutil
import statistics
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifacts.files import hold_lock, sync_to_disk
from pipeline.artifacts.inputs import open_external, require_artifact
from pipeline.artifacts.manifest import RESULTS_VERSION
from pipeline.config import Reward, nearest
from pipeline.data.quarantine import json_line, write_quarantine
from pipeline.data.readers import READERS, ParsedRecord
from pipeline.data.schema import RowError
from pipeline.data.validation import clean_record
from pipeline.distributed.processes import is_main_process, map_across_processes, on_main_process, world_size
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

KINDS = {"score": "answers", "best-of-n": "prompts"}  # kind of record, as pipeline.data.schema names it
OUTPUT_COLUMNS = {"score": ("reward",), "best-of-n": ("response", "reward", "reward_mean")}
RESPONSE_COLUMNS = ("response", "completion", "text")  # the first that a file has contains the response
CHUNK = 256  # responses between two writes: the most that an interruption loses
MAKE_COMMAND = "rlhf run --until"

Columns = dict[str, Any]
Compute = Callable[[Sequence[ParsedRecord]], list[Columns]]


class ScoringJob(NamedTuple):
    """A file to score: an item for each row, whose `record` is what the models read."""

    command: str
    source: Path
    output: Path
    items: list[ParsedRecord]

    @property
    def valid(self) -> list[ParsedRecord]:
        """The rows without a fault."""
        return [item for item in self.items if not item.fault]


# Commands


def score_file(
    job: ScoringJob,
    reward: Reward,
    *,
    batch_size: int,
    alpha: float | None,
    normalize: bool,
    overlong: str | None,
) -> None:
    """Write the rows of the job with the reward of each response.

    `overlong` is what happens to rows that the model cannot read whole; None cuts them as in its training.
    Raises `UserError`.
    """
    identity, model = _load_scorer(reward, overlong)
    how = model.settings.encoding
    model.overlong = check_rows(
        job,
        lambda record: model.encode(record["prompt"], record["response"]).overlong,
        f"max_length={how.max_length}",
        overlong or f"truncate_{how.truncation}",
    )
    score = partial(_finite_scores, model, batch_size=batch_size, alpha=alpha, normalize=normalize)

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        prompts = [item.record["prompt"] for item in items]
        responses = [item.record["response"] for item in items]
        return [{"reward": value} for value in score(prompts, responses)]

    settings = {
        "reward": identity,
        "positive_label": reward.positive_label,
        "alpha": alpha,
        "normalize": normalize,
        "overlong": overlong,
    }
    _score_rows(job, settings, compute, CHUNK)


def best_of_n_file(
    job: ScoringJob,
    reward: Reward,
    policy: str,
    *,
    n: int,
    max_prompt_tokens: int,
    batch_size: int,
    overlong: str,
    **sampling: Any,
) -> None:
    """Write the rows of the job with the best of `n` responses, its reward, and the mean reward of all n.

    `sampling` is seed, temperature and response_tokens. The random numbers of a response derive from its row
    and its number among the n. A policy with few positions reads a shorter prompt, so that the response fits.
    `overlong` is what happens to longer prompts. Raises `UserError`.
    """
    opened = require_artifact(policy, "policy", f"{MAKE_COMMAND} sft")
    identity, scorer = _load_scorer(reward)
    from pipeline.models.chat import prompt_ids
    from pipeline.models.generation import sample_responses
    from pipeline.models.loading import load_sampler
    from pipeline.models.positions import max_positions
    from pipeline.models.prompts import truncation_side

    model, tokenizer = load_sampler(str(opened.path), revision=opened.revision)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    positions = max_positions(model) or context
    prompt_tokens = min(max_prompt_tokens, positions - sampling["response_tokens"])
    if prompt_tokens < 1:
        raise UserError(
            f"{policy}: its {positions} positions leave no room for a prompt; lower --response-tokens"
        )
    options = {"max_prompt_tokens": prompt_tokens, "batch_size": batch_size, **sampling}
    options |= {"side": truncation_side(overlong)}

    def is_overlong(record: Columns) -> bool:
        scorer.encode(record["prompt"], "")  # raises if its template refuses the prompt
        return len(prompt_ids(tokenizer, record["prompt"])) > prompt_tokens

    check_rows(job, is_overlong, f"{prompt_tokens} prompt tokens", overlong)

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        prompts = [item.record["prompt"] for item in items for _ in range(n)]
        rows = [item.record["number"] * n + k for item in items for k in range(n)]
        batches = sample_responses(model, tokenizer, prompts, rows, **options)
        texts = [text for responses in batches for text in responses.texts]
        return _best_of_n(texts, _finite_scores(scorer, prompts, texts), n)

    settings = {
        "reward": identity,
        "positive_label": reward.positive_label,
        "policy": opened.identity,
        "n": n,
        "room": prompt_tokens,
        "overlong": overlong,
    }
    _score_rows(job, settings | sampling, compute, max(1, CHUNK // n))


def _best_of_n(texts: Sequence[str], rewards: Sequence[float], n: int) -> list[Columns]:
    """Return the columns of each group of `n` consecutive responses; of equal rewards the first wins."""
    rows = []
    for start in range(0, len(texts), n):
        group = range(start, start + n)
        best = max(group, key=rewards.__getitem__)
        mean = statistics.fmean(rewards[i] for i in group)
        rows.append({"response": texts[best], "reward": rewards[best], "reward_mean": mean})
    return rows


def compare_responses(
    reward: Reward, prompt: str, responses: Sequence[str], overlong: str | None = None
) -> str:
    """Return a table of the responses, best first, no wider than the terminal.

    `overlong: drop` leaves out responses that the model cannot read whole; others are cut. Raises `UserError`
    if the prompt or a response is not a text.
    """
    for number, response in enumerate(responses, 1):
        try:
            record = clean_record(KINDS["score"], {"prompt": prompt, "response": response}, [])
        except RowError as fault:
            detail = fault.detail.removeprefix("response: ")
            raise UserError(f"response {number} of {len(responses)}: {detail}") from None

    model = _load_scorer(reward, overlong)[1]
    prompt, most, total = record["prompt"], model.settings.encoding.max_length, len(responses)
    cut = [response for response in responses if model.encode(prompt, response).overlong]
    if cut and overlong == "drop":
        responses = [response for response in responses if response not in cut]
        if not responses:
            raise UserError(f"compare: every response is over max_length={most}; use another --overlong")
    model.overlong = len(cut)  # told below
    rewards = _finite_scores(model, [prompt] * len(responses), responses)
    ranked = sorted(zip(rewards, responses, strict=True), key=lambda pair: -pair[0])
    rows = [
        ("rank", "score", "response"),
        *((str(rank), f"{value:.4f}", response) for rank, (value, response) in enumerate(ranked, 1)),
    ]
    width = max(len(value) for _, value, _ in rows)
    text_width = shutil.get_terminal_size().columns - width - 8
    lines = [f"{rank:>4}  {value:>{width}}  {_fit_to_width(text, text_width)}" for rank, value, text in rows]
    if cut:
        outcome = "left out" if overlong == "drop" else "cut"
        lines.append(f"  over max_length={most}, {outcome}: {len(cut)} of {total}")
    return "\n".join(lines)


def _load_scorer(reward: Reward, overlong: str | None = None) -> tuple[str, Any]:
    """Return the reward model's identity and the model, which truncates as `overlong` says."""
    from pipeline.reward.functions import load_reward, require_reward

    opened = require_reward(reward, f"{MAKE_COMMAND} reward")
    side = {"truncate_left": "left", "truncate_right": "right"}.get(overlong or "")
    options = {"encoding": {"truncation": side}} if side else {}
    return opened.identity, load_reward(reward, opened, **options)


def _finite_scores(
    model: Any, prompts: Sequence[Any], responses: Sequence[Any], **options: Any
) -> list[float]:
    rewards: list[float] = model.score(prompts, responses, **options)
    if wrong := [value for value in rewards if not math.isfinite(value)]:
        raise UserError(
            f"{model.model.name_or_path}: gives the reward {wrong[0]}, expected a finite number; "
            "its weights are broken: train it again"
        )
    return rewards


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


def _fit_to_width(text: str, width: int) -> str:
    """Return the text on one line of `width` terminal columns; a wide character takes two."""
    text = " ".join(text.split())
    ends = list(accumulate(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text))
    return text if not ends or ends[-1] <= width else text[: bisect_right(ends, width - 1)] + "…"


# Reading


def read_job(command: str, source: Path, output: Path, force: bool) -> ScoringJob:
    """Read the rows to score; a wrong row is an item with a fault.

    Raises `UserError` if a path or a column is wrong, if no row is valid, or if the output cannot be written.
    """
    _check_paths(source, output, force)
    rows = list(READERS[source.suffix.lower()](source))
    names = list(dict.fromkeys(name for row in rows if not row.fault for name in row.data))
    column = _find_column(command, source, names)

    items = [ParsedRecord(KINDS[command], {}, [row], row.fault) for row in rows]
    for number, item in enumerate(items):
        if not item.fault:
            data = item.rows[0].data
            fields = {"prompt": data.get("prompt"), "response": data.get(column)}
            try:
                item.record = clean_record(item.kind, fields, []) | {"number": number}
            except RowError as fault:
                item.fault = fault

    job = ScoringJob(command, source, output, items)
    if not job.valid:
        first = f"; line {items[0].rows[0].line}: {items[0].fault.detail}" if items and items[0].fault else ""
        raise UserError(f"{source}: none of its {len(items)} rows can be scored{first}")
    _encode_output(job, [item.rows[0].data for item in job.valid])  # raises before any model is loaded
    return job


def _find_column(command: str, source: Path, names: list[str]) -> str:
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
    if taken := [name for name in OUTPUT_COLUMNS[command] if name in names]:
        raise UserError(
            f"{source}: already has a column {taken[0]!r}, which {command} would write; rename or remove it"
        )
    return column


def _check_paths(source: Path, output: Path, force: bool) -> None:
    if output.suffix.lower() not in ENCODERS:
        raise UserError(f"--output {output}: expected a name that ends in {', '.join(ENCODERS)}")
    if not source.is_file():
        problem = "is not a file" if source.exists() else "does not exist"
        raise UserError(f"--input {source}: {problem}; expected {', '.join(READERS)}")
    if source.suffix.lower() not in READERS:
        raise UserError(f"--input {source}: expected a name that ends in {', '.join(READERS)}")
    if output.exists() and (output.is_dir() or output.samefile(source)):
        problem = "is a folder" if output.is_dir() else "is the input"
        raise UserError(f"--output {output}: {problem}; name another file")
    if output.exists() and not force:
        raise UserError(f"--output {output}: exists already; name another file, or add --force to replace it")


# Computing


def _score_rows(job: ScoringJob, settings: dict[str, Any], compute: Compute, chunk: int) -> None:
    """Write the valid rows with the columns that `compute` returns; resume an interrupted run.

    Each process computes `chunk` rows at a time, and rank 0 writes. `settings` is all that decides the
    columns. The batch size is not part of it, so that it can be lowered after a run that was out of memory.
    """
    settings = {
        "command": job.command,
        "version": RESULTS_VERSION,
        "input": open_external(job.source, "source").identity,
    } | settings
    partial = _sibling(job.output, "partial.jsonl")
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
        _publish(job, done)
        partial.unlink()
    _print_outcome(job)


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


# Writing


def _publish(job: ScoringJob, columns: list[Columns]) -> None:
    """Write the quarantine, then the complete output; after a crash the previous output is still there."""
    rows = [item.rows[0].data | new for item, new in zip(job.valid, columns, strict=True)]
    temporary = _sibling(job.output, "tmp")
    temporary.write_bytes(_encode_output(job, rows))
    sync_to_disk(temporary)

    _quarantine_file(job).unlink(missing_ok=True)  # belongs to the output that is replaced
    if len(rows) < len(job.items):
        write_quarantine([(item.rows[0], item.fault) for item in job.items], _quarantine_file(job))
    os.replace(temporary, job.output)
    sync_to_disk(job.output.parent)


def _encode_output(job: ScoringJob, rows: list[Columns]) -> bytes:
    """Return the bytes of the output: the columns that any row has, the new ones last."""
    new = OUTPUT_COLUMNS[job.command]
    names = sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name in new)
    return ENCODERS[job.output.suffix.lower()](names, rows, job.source)


def _encode_csv(names: list[str], rows: list[Columns], source: Path) -> bytes:
    lines: list[list[Any]] = [names, *([row.get(name) for name in names] for row in rows)]
    # Not csv.writer: with these line ends it leaves a lone \r unquoted up to Python 3.12.
    text = "".join(",".join(map(_csv_field, line)) + "\n" for line in lines)
    return text.encode("utf-8", "backslashreplace")


def _csv_field(value: Any) -> str:
    """Return a field: empty for None, JSON for a list or a dict."""
    if value is None:
        return ""
    text = json_line(value).rstrip() if isinstance(value, list | dict) else str(value)
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _encode_jsonl(names: list[str], rows: list[Columns], source: Path) -> bytes:
    return "".join(map(json_line, rows)).encode()


def _encode_parquet(names: list[str], rows: list[Columns], source: Path) -> bytes:
    """Encode with the types of a Parquet source, else with those of the values.

    Raises `UserError` if the values of a column have several types.
    """
    import pyarrow
    from pyarrow import parquet

    schema = parquet.read_schema(source) if source.suffix.lower() == ".parquet" else []
    types = {field.name: field.type for field in schema}
    stream = io.BytesIO()
    try:
        columns = {name: pyarrow.array([row.get(name) for row in rows], types.get(name)) for name in names}
        parquet.write_table(pyarrow.table(columns), stream)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{source}: cannot be written as Parquet: {error}; write a .jsonl") from None
    return stream.getvalue()


ENCODERS: dict[str, Callable[[list[str], list[Columns], Path], bytes]] = {
    ".csv": _encode_csv,
    ".jsonl": _encode_jsonl,
    ".parquet": _encode_parquet,
}
