"""`rlhf score`, `best-of-n` and `compare`: score the rows of a file, or rank responses on the terminal.

In: a CSV, TSV, JSON, JSONL or Parquet file.
Out: a CSV, JSONL or Parquet file of the same rows in the same order, with new columns. If rows are wrong,
they are beside it in OUTPUT.quarantine.jsonl, as prepare writes it.

torch is imported only after the files have been checked.
"""

import math
import shutil
import statistics
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from pipeline.config import Reward
from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import RawRow, RowError
from pipeline.data.validation import clean_record
from pipeline.distributed.processes import is_main_process
from pipeline.errors import UserError, as_line
from pipeline.reward.steps import read_steps
from pipeline.tools.score import chunks
from pipeline.tools.score.encoders import Columns
from pipeline.tools.score.job import KINDS, RESPONSE_COLUMNS, STEP_COLUMN, ScoringJob, check_rows
from pipeline.tools.score.sampling import MAKE_COMMAND, open_sampler, require_policy


def score_file(
    job: ScoringJob,
    reward: Reward,
    *,
    batch_size: int,
    alpha: float | None,
    normalize: bool,
    overlong: str | None,
) -> None:
    """Write the rows of the job with the reward of each response, and of each step if the model is stepwise.

    `overlong` is what happens to rows that the model cannot read whole; None cuts them as in its training.
    Raises `UserError`.
    """
    if reward.is_function:
        _score_file_by_function(job, reward, alpha=alpha, normalize=normalize, overlong=overlong)
        return
    identity, model = _load_scorer(reward, overlong)
    how = model.settings.encoding

    def is_overlong(record: Columns) -> bool:
        text, _ = read_steps(_response(record), how.step_separator)
        return bool(model.encode(record["prompt"], text).overlong)

    model.overlong = check_rows(
        job, is_overlong, f"max_length={how.max_length}", overlong or f"truncate_{how.truncation}"
    )
    if model.settings.is_stepwise:
        job = job.with_step_scores()
        _warn_of_single_steps(job, model)
    else:
        _refuse_steps(job, reward)

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        prompts = [item.record["prompt"] for item in items]
        responses = [_response(item.record) for item in items]
        options = {"alpha": alpha, "normalize": normalize}
        if not model.settings.is_stepwise:
            scores = _finite_scores(model, prompts, responses, batch_size=batch_size, **options)
            return [{"reward": value} for value in scores]
        steps = model.score_steps(prompts, responses, batch_size=batch_size)
        rewards = _require_finite(model, model.aggregate(steps, **options))
        return [{"reward": value, STEP_COLUMN: row} for value, row in zip(rewards, steps, strict=True)]

    settings = {
        "reward": identity,
        "positive_label": reward.positive_label,
        "alpha": alpha,
        "normalize": normalize,
        "overlong": overlong,
    }
    chunks.score_rows(job, settings, compute, chunks.CHUNK)


def _score_file_by_function(job: ScoringJob, reward: Reward, **options: Any) -> None:
    from pipeline.models.chat import response_text
    from pipeline.tools.score.functions import load_function, note_missing_ids, score_items

    identity, function = load_function(reward, **options)
    _refuse_steps(job, reward)
    note_missing_ids(job.command, reward.source, function)
    read = ("prompt", next(name for name in RESPONSE_COLUMNS if name in job.names))
    names = [name for name in job.names if name not in read]

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        texts = [response_text(item.record["response"]) for item in items]
        return [{"reward": value} for value in score_items(function, items, names, texts)]

    chunks.score_rows(job, {"reward": identity}, compute, chunks.CHUNK)


def _refuse_steps(job: ScoringJob, reward: Reward) -> None:
    if job.has_steps:
        raise UserError(
            f"{job.source}: 'completions' has the steps of responses, and {reward.source} scores whole "
            "responses; name a stepwise model, or write each response into a column 'response'"
        )


def _response(record: Columns) -> Any:
    """Return the response of a record: a text, messages, or the list of its steps."""
    return record["completions"] if "completions" in record else record["response"]


def _warn_of_single_steps(job: ScoringJob, model: Any) -> None:
    """Print that no response of a file has two steps, which a wrong separator would explain."""
    separator = model.settings.encoding.step_separator
    model.warned_of_single_steps = True  # it sees a part of the file at a time
    steps = (read_steps(_response(item.record), separator)[1] for item in job.valid)
    if is_main_process() and not job.has_steps and all(len(ends) == 1 for ends in steps):
        print(
            f"{job.command}: each response is one step: none has the separator {separator!r} between two "
            "steps, see encoding.step_separator",
            flush=True,
        )


def best_of_n_file(job: ScoringJob, reward: Reward, policy: str, *, n: int, **options: Any) -> None:
    """Write the rows of the job with the best of `n` responses, its reward, and the mean reward of all n.

    `options` are those of `open_sampler`. Raises `UserError`.
    """
    opened = require_policy(policy)
    identity, check_prompt, score = load_candidate_scorer(job, reward)
    sample, settings = open_sampler(job, opened, n, check_prompt=check_prompt, **options)

    def compute(items: Sequence[ParsedRecord]) -> list[Columns]:
        repeated = [item for item in items for _ in range(n)]
        batches = sample(items)
        texts = [text for responses in batches for text in responses.texts]
        return _best_of_n(texts, score(repeated, texts, batches), n)

    settings |= {"reward": identity, "positive_label": reward.positive_label}
    chunks.score_rows(job, settings, compute, max(1, chunks.CHUNK // n))


def load_candidate_scorer(
    job: ScoringJob, reward: Reward
) -> tuple[str, Callable[[Any], Any], Callable[..., list[float]]]:
    """Return the reward's identity, a check of a prompt, and a scorer of (items, texts, batches).

    The check raises `UserError` if the template of a reward model refuses the prompt.
    """
    if not reward.is_function:
        identity, model = _load_scorer(reward)
        return (
            identity,
            lambda prompt: model.encode(prompt, ""),
            lambda items, texts, _: _finite_scores(model, [item.record["prompt"] for item in items], texts),
        )
    from pipeline.tools.score.functions import load_function, score_items

    identity, function = load_function(reward)
    names = [name for name in job.names if name != "prompt"]

    def score(items: Sequence[ParsedRecord], texts: Sequence[str], batches: Sequence[Any]) -> list[float]:
        ids = [row for responses in batches for row in responses.token_lists()]
        ended = [end for responses in batches for end in responses.ended]
        return score_items(function, items, names, texts, ids, ended)

    return identity, lambda prompt: None, score


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
            record = clean_record(KINDS["response"], {"prompt": prompt, "response": response}, [])
        except RowError as fault:
            detail = fault.detail.removeprefix("response: ")
            raise UserError(f"response {number} of {len(responses)}: {detail}") from None

    if reward.is_function:
        return _rank_text(responses, _function_scores(reward, record["prompt"], responses, overlong))
    model = _load_scorer(reward, overlong)[1]
    prompt, most, total = record["prompt"], model.settings.encoding.max_length, len(responses)
    cut = [response for response in responses if model.encode(prompt, response).overlong]
    if cut and overlong == "drop":
        responses = [response for response in responses if response not in cut]
        if not responses:
            raise UserError(f"compare: every response is over max_length={most}; use another --overlong")
    model.overlong = len(cut)  # told below
    table = _rank_text(responses, _finite_scores(model, [prompt] * len(responses), responses))
    if not cut:
        return table
    outcome = "left out" if overlong == "drop" else "cut"
    return f"{table}\n  over max_length={most}, {outcome}: {len(cut)} of {total}"


def _function_scores(
    reward: Reward, prompt: str, responses: Sequence[str], overlong: str | None
) -> list[float]:
    from pipeline.tools.score.functions import load_function, note_missing_ids, score_items

    _, function = load_function(reward, overlong=overlong)
    note_missing_ids("compare", reward.source, function)
    items = [ParsedRecord("answers", {"prompt": prompt}, [RawRow("compare", 1, {})]) for _ in responses]
    return score_items(function, items, (), responses)


def _rank_text(responses: Sequence[str], rewards: Sequence[float]) -> str:
    """Return a table of the responses, best first, no wider than the terminal."""
    ranked = sorted(zip(rewards, responses, strict=True), key=lambda pair: -pair[0])
    rows = [
        ("rank", "score", "response"),
        *((str(rank), f"{value:.4f}", response) for rank, (value, response) in enumerate(ranked, 1)),
    ]
    width = max(len(value) for _, value, _ in rows)
    text_width = shutil.get_terminal_size().columns - width - 8
    return "\n".join(
        f"{rank:>4}  {value:>{width}}  {_fit_to_width(text, text_width)}" for rank, value, text in rows
    )


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
    return _require_finite(model, model.score(prompts, responses, **options))


def _require_finite(model: Any, rewards: list[float]) -> list[float]:
    if wrong := [value for value in rewards if not math.isfinite(value)]:
        raise UserError(
            f"{model.model.name_or_path}: gives the reward {wrong[0]}, expected a finite number; "
            "its weights are broken: train it again"
        )
    return rewards


def _fit_to_width(text: str, width: int) -> str:
    """Return the text on one line of `width` terminal columns; a wide character takes two."""
    text = as_line(text)
    ends = list(accumulate(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text))
    return text if not ends or ends[-1] <= width else text[: bisect_right(ends, width - 1)] + "…"
