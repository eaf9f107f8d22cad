"""`rlhf generate`: sample responses to the prompts of a file, for people to judge.

In: a CSV, TSV, JSON, JSONL or Parquet file with a column `prompt`.
Out: the same rows with the columns `response_1` to `response_n`. Wrong rows are in OUTPUT.quarantine.jsonl.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.data.readers import ParsedRecord
from pipeline.tools.score import chunks
from pipeline.tools.score.encoders import Columns
from pipeline.tools.score.job import ScoringJob
from pipeline.tools.score.sampling import open_sampler, require_policy


def name_columns(n: int) -> tuple[str, ...]:
    """Return the names of the columns that `generate` writes."""
    return tuple(f"response_{number}" for number in range(1, n + 1))


def generate_file(job: ScoringJob, policy: str, *, n: int, **options: Any) -> None:
    """Write the rows of the job with `n` responses of the policy, the texts that `best_of_n_file` samples.

    `options` are those of `open_sampler`. Raises `UserError`.
    """
    sample, settings = open_sampler(job, require_policy(policy), n, **options)

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        texts = [text for responses in sample(items) for text in responses.texts]
        starts = range(0, len(texts), n)
        return [dict(zip(job.columns, texts[start : start + n], strict=True)) for start in starts]

    chunks.score_rows(job, settings, compute, max(1, chunks.CHUNK // n))
