"""`rlhf label`: compare the responses that `generate` wrote, by a judge or by another reward.

In: a CSV, TSV, JSON, JSONL or Parquet file with the columns `prompt` and `response_1` to `response_n`.
Out: a row for each pair of different responses: the row's other columns, and `COLUMNS`. `prepare` reads them
as comparisons. Wrong rows are in OUTPUT.quarantine.jsonl.
"""

import random
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from pipeline.config import Reward
from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import RawRow, RowError
from pipeline.data.validation import clean_record
from pipeline.errors import UserError
from pipeline.tools.score import chunks
from pipeline.tools.score.commands import load_candidate_scorer
from pipeline.tools.score.encoders import Columns
from pipeline.tools.score.job import ScoringJob

COLUMNS = ("chosen", "rejected", "preference", "chosen_score", "rejected_score", "labeller")
SIDES = ("first", "second")
_RESPONSE = re.compile(r"response_[1-9]\d*")


def label_file(job: ScoringJob, reward: Reward, *, pairs: int | None, seed: int) -> None:
    """Write a comparison for each pair of a row's responses; the response with the higher reward is `chosen`.

    Equal rewards are a tie: the preference 0.5, which `prepare` reads as `ties` says. `pairs` is the most
    pairs of a row, drawn by the `seed` and the number of the row; None takes all. Raises `UserError`.
    """
    job = split_into_pairs(job, pairs, seed)
    identity, check_prompt, score = load_candidate_scorer(job, reward)
    _check_prompts(job, check_prompt)

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        return label_by_scores(items, lambda items, texts: score(items, texts, ()), reward.source)

    settings = {"reward": identity, "positive_label": reward.positive_label, "pairs": pairs, "seed": seed}
    chunks.score_rows(job, settings, compute, chunks.CHUNK)


def split_into_pairs(job: ScoringJob, pairs: int | None, seed: int) -> ScoringJob:
    """Return the job with an item for each pair of responses: `prompt`, `number`, `first` and `second`.

    A response that a row repeats is compared once. A row without two different responses gets a fault. Raises
    `UserError` if the file has no columns of responses, or if no row has a pair.
    """
    names = sorted(filter(_RESPONSE.fullmatch, job.names), key=lambda name: int(name.partition("_")[2]))
    if len(names) < 2:
        raise UserError(
            f"{job.source}: label needs the columns 'response_1' and 'response_2', found "
            f"{', '.join(job.names)}; write them with rlhf generate --n 2"
        )
    items: list[ParsedRecord] = []
    for item in job.items:
        try:
            items += [item] if item.fault else _pairs_of(item, names, pairs, seed)
        except RowError as fault:
            items.append(ParsedRecord(item.kind, {}, item.rows, fault))
    job = job._replace(items=items, names=[name for name in job.names if name not in names])
    if not job.valid:
        raise UserError(f"{job.source}: no row has two responses to compare{_first_fault(job)}")
    return job


def _pairs_of(item: ParsedRecord, names: Sequence[str], pairs: int | None, seed: int) -> list[ParsedRecord]:
    """Return an item for each pair of the row's responses. Raises `RowError`."""
    row = item.rows[0]
    texts = {name: row.data[name] for name in names if row.data.get(name) is not None}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise RowError("not-text", f"{name}: expected text, found {type(text).__name__}")
        clean_record("answers", {"prompt": row.data["prompt"], "response": text}, [])
    different = list(dict.fromkeys(texts.values()))
    if len(different) < 2:
        raise RowError("identical-answers", f"{len(texts)} responses, {len(different)} of them different")

    couples = list(combinations(different, 2))
    if pairs is not None and pairs < len(couples):
        generator = random.Random(f"{seed} {item.record['number']}")
        couples = [couples[place] for place in sorted(generator.sample(range(len(couples)), pairs))]
    others = {name: value for name, value in row.data.items() if name not in names}
    bare = [RawRow(row.source, row.line, others)]
    return [
        ParsedRecord("pairs", item.record | dict(zip(SIDES, couple, strict=True)), bare) for couple in couples
    ]


def _check_prompts(job: ScoringJob, check_prompt: Callable[[Any], Any]) -> None:
    """Set the fault of rows whose prompt the template of a reward model refuses."""
    for item in job.valid:
        try:
            check_prompt(item.record["prompt"])
        except UserError as error:
            item.fault = RowError("refused", str(error))
    if not job.valid:
        raise UserError(f"{job.source}: no row is left to label{_first_fault(job)}")


def _first_fault(job: ScoringJob) -> str:
    item = job.items[0]
    return f"; line {item.rows[0].line}: {item.fault.detail}" if item.fault else ""


def label_by_scores(
    items: Sequence[ParsedRecord], score: Callable[..., Sequence[float]], labeller: str
) -> list[Columns]:
    """Return the columns of each pair by the scores of its responses; each response is scored once.

    `score` takes items and the texts of responses to their prompts.
    """
    responses = {(item.record["number"], item.record[side]): item for item in items for side in SIDES}
    values = score(list(responses.values()), [text for _, text in responses])
    scores = dict(zip(responses, values, strict=True))

    rows = []
    for item in items:
        number, *texts = (item.record[name] for name in ("number", *SIDES))
        pair = [(scores[number, text], text) for text in texts]
        (high, chosen), (low, rejected) = sorted(pair, key=lambda scored: -scored[0])
        preference = 1.0 if high > low else 0.5
        rows.append(dict(zip(COLUMNS, (chosen, rejected, preference, high, low, labeller), strict=True)))
    return rows
