"""Scoring files: rows in, the same rows with a reward out; by the way, the best of n sampled answers, and a ranking on the terminal.

In: a CSV, TSV, JSON, JSONL or Parquet file. Out: a CSV, JSONL or Parquet file of the same rows in the same order, with new columns, and
beside it, where rows are wrong, OUTPUT.quarantine.jsonl, as prepare writes it. While it is made:

    .OUTPUT.partial.jsonl    what it is made from, then a line for each chunk computed; the same command goes on from it
    .OUTPUT.lock             one writer at a time
    .OUTPUT.tmp              the output, until it is whole

torch is imported only once the files are known to be right.
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
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifacts.files import hold_lock, sync_to_disk
from pipeline.artifacts.inputs import open_external, require_artifact
from pipeline.artifacts.manifest import RESULTS_VERSION
from pipeline.config import Reward, nearest
from pipeline.data.quarantine import json_line, write_quarantine
from pipeline.data.readers import READERS, ParsedRecord, RowError
from pipeline.data.validation import clean_record
from pipeline.distributed.processes import is_main_process, map_across_processes, on_main_process, world_size
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError

KINDS = {"score": "answers", "best-of-n": "prompts"}  # as `checks` knows them

OUTPUT_COLUMNS = {"score": ("reward",), "best-of-n": ("response", "reward", "reward_mean")}

RESPONSE_COLUMNS = ("response", "completion", "text")  # the first of them that a file has is the answer

CHUNK = 256  # answers between two writes: what an interruption costs at most

MAKE_COMMAND = "rlhf run --until"


Columns = dict[str, Any]

Score = Callable[[Sequence[Any], Sequence[Any]], list[float]]


class ScoringJob(NamedTuple):
    """A file to be filled: an item for each row, `record` what the models read of it."""

    command: str
    source: Path
    output: Path
    items: list[ParsedRecord]

    @property
    def sound(self) -> list[ParsedRecord]:
        return [item for item in self.items if not item.fault]


def score_file(
    work: ScoringJob, reward: Reward, *, batch_size: int, alpha: float | None, normalize: bool
) -> None:
    """The reward of each answer."""
    identity, rewards = _load_scorer(reward, batch_size=batch_size, alpha=alpha, normalize=normalize)

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        found = rewards(
            [item.record["prompt"] for item in items], [item.record["response"] for item in items]
        )
        return [{"reward": value} for value in found]

    made_from = {
        "reward": identity,
        "positive_label": reward.positive_label,
        "alpha": alpha,
        "normalize": normalize,
    }
    _score_rows(work, made_from, compute, CHUNK)


def best_of_n_file(
    work: ScoringJob,
    reward: Reward,
    policy: str,
    *,
    n: int,
    max_prompt_tokens: int,
    batch_size: int,
    **drawn: Any,
) -> None:
    """Of `n` answers to each prompt the best, its reward, and the mean of all; `drawn` is seed, temperature and response_tokens.

    The noise of an answer is that of its row and its number in it. A policy of few positions reads as much of a prompt as leaves room.
    """
    source = require_artifact(policy, "policy", f"{MAKE_COMMAND} sft")
    identity, rewards = _load_scorer(reward)
    from pipeline.models.generation import sample_responses
    from pipeline.models.loading import load_sampler

    model, tokenizer = load_sampler(str(source.path), revision=source.revision)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    room = min(max_prompt_tokens, positions - drawn["response_tokens"])
    if room < 1:
        raise UserError(
            f"{policy}: its {positions} positions leave no room for a prompt; lower --response-tokens"
        )

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        prompts = [item.record["prompt"] for item in items for _ in range(n)]
        rows = [item.record["number"] * n + k for item in items for k in range(n)]
        batches = sample_responses(
            model, tokenizer, prompts, rows, max_prompt_tokens=room, batch_size=batch_size, **drawn
        )
        texts = [text for answers in batches for text in answers.texts]
        found = rewards(prompts, texts)
        groups = [range(start, start + n) for start in range(0, len(texts), n)]
        best = [max(group, key=found.__getitem__) for group in groups]
        means = [statistics.fmean(found[i] for i in group) for group in groups]
        return [
            {"response": texts[i], "reward": found[i], "reward_mean": mean}
            for i, mean in zip(best, means, strict=True)
        ]

    made_from = {
        "reward": identity,
        "positive_label": reward.positive_label,
        "policy": source.identity,
        "n": n,
        "room": room,
    } | drawn
    _score_rows(work, made_from, compute, max(1, CHUNK // n))


def compare_responses(reward: Reward, prompt: str, answers: Sequence[str]) -> str:
    """A table of the answers, best first, no wider than the terminal. Raises `UserError` where one is no text."""
    for number, answer in enumerate(answers, 1):
        try:
            asked = clean_record("answers", {"prompt": prompt, "response": answer}, [])["prompt"]
        except RowError as fault:
            raise UserError(f"answer {number} of {len(answers)}: {fault.detail}") from None
    scores = _load_scorer(reward)[1]([asked] * len(answers), answers)
    ranked = sorted(zip(scores, answers, strict=True), key=lambda pair: -pair[0])
    rows = [
        ("rank", "score", "answer"),
        *((str(rank), f"{value:.4f}", answer) for rank, (value, answer) in enumerate(ranked, 1)),
    ]
    width = max(len(value) for _, value, _ in rows)
    room = shutil.get_terminal_size().columns - width - 8
    return "\n".join(
        f"{rank:>4}  {value:>{width}}  {_fit_to_width(answer, room)}" for rank, value, answer in rows
    )


def _load_scorer(reward: Reward, **options: Any) -> tuple[str, Score]:
    """(identity, (prompts, answers) -> rewards, finite ones); `options` go to `RewardModel.score`."""
    from pipeline.reward.functions import load_reward, require_reward

    opened = require_reward(reward, f"{MAKE_COMMAND} reward")
    model = load_reward(reward, opened)

    def rewards(prompts: Sequence[Any], answers: Sequence[Any]) -> list[float]:
        found = model.score(prompts, answers, **options)
        if wrong := [value for value in found if not math.isfinite(value)]:
            raise UserError(
                f"{opened.path}: gives the reward {wrong[0]}; expected finite ones; its weights are broken: train it again"
            )
        return found

    return opened.identity, rewards


def _fit_to_width(text: str, room: int) -> str:
    """On one line of `room` columns of a terminal, of which a wide character takes two."""
    text = " ".join(text.split())
    ends = list(accumulate(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text))
    return text if not ends or ends[-1] <= room else text[: bisect_right(ends, room - 1)] + "…"


# Reading


def read_job(command: str, source: Path, output: Path, force: bool) -> ScoringJob:
    """What there is to do; a wrong row is an item with a fault. Raises `UserError` where that is nothing, or the output is in the way."""
    _check_paths(source, output, force)
    rows = list(READERS[source.suffix.lower()](source))
    found = list(dict.fromkeys(name for row in rows if not row.fault for name in row.data))
    needed = RESPONSE_COLUMNS if command == "score" else ("prompt",)
    column = next((name for name in needed if name in found), needed[0])
    if found and column not in found:
        hint = nearest(column, found) or "; rename the one that is meant"
        raise UserError(
            f"{source}: {command} needs a column {' or '.join(map(repr, needed))}, found {', '.join(found)}{hint}"
        )
    if taken := [name for name in OUTPUT_COLUMNS[command] if name in found]:
        raise UserError(
            f"{source}: has a column {taken[0]!r} already, which {command} would write; rename or remove it"
        )
    items = [ParsedRecord(KINDS[command], {}, [row], row.fault) for row in rows]
    for number, item in enumerate(items):
        if not item.fault:
            data = item.rows[0].data
            try:
                given = {"prompt": data.get("prompt"), "response": data.get(column)}
                item.record = clean_record(item.kind, given, []) | {"number": number}
            except RowError as fault:
                item.fault = fault
    work = ScoringJob(command, source, output, items)
    if not work.sound:
        first = f"; line {items[0].rows[0].line}: {items[0].fault.detail}" if items and items[0].fault else ""
        raise UserError(f"{source}: of {len(items)} rows none can be scored{first}")
    _encode_output(work, [item.rows[0].data for item in work.sound])  # what cannot be written is told now
    return work


def _check_paths(source: Path, output: Path, force: bool) -> None:
    if output.suffix.lower() not in ENCODERS:
        raise UserError(f"--output {output}: expected a name that ends in {', '.join(ENCODERS)}")
    if not source.is_file():
        raise UserError(
            f"--input {source}: {'is no file' if source.exists() else 'does not exist'}; expected {', '.join(READERS)}"
        )
    if source.suffix.lower() not in READERS:
        raise UserError(f"--input {source}: expected a name that ends in {', '.join(READERS)}")
    if output.exists() and (output.is_dir() or output.samefile(source)):
        raise UserError(
            f"--output {output}: is {'a folder' if output.is_dir() else 'the input'}; name another file"
        )
    if output.exists() and not force:
        raise UserError(f"--output {output}: exists already; name another file, or add --force to replace it")


# Computing


def _score_rows(
    work: ScoringJob,
    made_from: dict[str, Any],
    compute: Callable[[Sequence[ParsedRecord]], list[Columns]],
    chunk: int,
) -> None:
    """Write the sound rows with the columns that `compute` gives them, `chunk` rows at a time and process; go on where the same was
    interrupted. Rank 0 writes.

    `made_from` is what decides them: no batch size, which may be lowered after a run out of memory.
    """
    made_from = {
        "command": work.command,
        "version": RESULTS_VERSION,
        "input": open_external(work.source, "source").identity,
    } | made_from
    partial = _sibling(work.output, "partial.jsonl")
    rows, chunk = work.sound, chunk * world_size()

    def begin() -> list[Columns]:
        held.enter_context(_locked(work.output))
        found = _resume(partial, made_from)
        if found:
            print(
                f"{work.command}: resuming {partial}: {len(found):,} of {len(rows):,} rows are done",
                flush=True,
            )
        return found

    with ExitStack() as held:
        done = on_main_process(begin)
        with progress_bar(work.command, "rows", total=len(rows), initial=len(done)) as shown:
            for start in range(len(done), len(rows), chunk):
                found = map_across_processes(compute, rows[start : start + chunk])
                done += _append(partial, found) if is_main_process() else found
                shown.update(len(done) - start)
        if not is_main_process():
            return
        _publish(work, done)
        partial.unlink()
    reasons = Counter(item.fault.reason for item in work.items if item.fault)
    if reasons:
        print(
            f"  quarantined: {', '.join(f'{reason} {count:,}' for reason, count in sorted(reasons.items()))}; see {_quarantine_file(work)}"
        )
    print(f"{len(rows):,} rows scored, {reasons.total():,} quarantined: {work.output}", flush=True)


def _resume(partial: Path, made_from: dict[str, Any]) -> list[Columns]:
    """What an interrupted run of the same computed; the partial file is left with that alone, without a line that was torn."""
    lines = partial.read_bytes().splitlines(keepends=True) if partial.exists() else []
    head, *done = _whole_lines(lines) or [{}]
    if head == made_from:
        os.truncate(partial, sum(map(len, lines[: len(done) + 1])))
        return [columns for part in done for columns in part]
    if lines:
        changed = [key for key in made_from if head.get(key, ...) != made_from[key]]
        print(f"{partial}: was made from another {', '.join(changed)}; starting afresh", flush=True)
    partial.unlink(missing_ok=True)
    _append(partial, made_from)
    return []


def _whole_lines(lines: list[bytes]) -> list[Any]:
    """The values of the lines before the first that is torn."""
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


def _quarantine_file(work: ScoringJob) -> Path:
    return work.output.with_name(f"{work.output.name}.quarantine.jsonl")


# Writing


def _publish(work: ScoringJob, columns: list[Columns]) -> None:
    """The quarantine, then the output, whole: a crash in here leaves what was there, or all."""
    rows = [item.rows[0].data | new for item, new in zip(work.sound, columns, strict=True)]
    temporary = _sibling(work.output, "tmp")
    temporary.write_bytes(_encode_output(work, rows))
    sync_to_disk(temporary)
    _quarantine_file(work).unlink(missing_ok=True)  # that of what is replaced
    if len(rows) < len(work.items):
        write_quarantine([(item.rows[0], item.fault) for item in work.items], _quarantine_file(work))
    os.replace(temporary, work.output)
    sync_to_disk(work.output.parent)


def _encode_output(work: ScoringJob, rows: list[Columns]) -> bytes:
    """The output with these rows: the columns that any of them has, the new ones last."""
    names = sorted(
        dict.fromkeys(name for row in rows for name in row),
        key=lambda name: name in OUTPUT_COLUMNS[work.command],
    )
    return ENCODERS[work.output.suffix.lower()](names, rows, work.source)


def _encode_csv(names: list[str], rows: list[Columns], source: Path) -> bytes:
    lines: list[list[Any]] = [names, *([row.get(name) for name in names] for row in rows)]
    # Not csv.writer: with these line ends it leaves a lone \r unquoted up to Python 3.12.
    return "".join(",".join(map(_csv_field, line)) + "\n" for line in lines).encode(
        "utf-8", "backslashreplace"
    )


def _csv_field(value: Any) -> str:
    """A field; None is empty, what is no text or number is JSON."""
    text = (
        "" if value is None else json_line(value).rstrip() if isinstance(value, list | dict) else str(value)
    )
    return '"' + text.replace('"', '""') + '"' if re.search('[",\r\n]', text) else text


def _encode_jsonl(names: list[str], rows: list[Columns], source: Path) -> bytes:
    return "".join(map(json_line, rows)).encode()


def _encode_parquet(names: list[str], rows: list[Columns], source: Path) -> bytes:
    """In the types of the source where that is Parquet, else in those of the values. Raises `UserError` where a column has several."""
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
