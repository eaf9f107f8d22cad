"""Rows with several responses that are scored or ranked. Imports no torch."""

import re
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from pipeline.data.dialogues import parse_turns
from pipeline.data.messages import preview
from pipeline.data.schema import Record, RowError
from pipeline.data.shapes.fields import Part, rank_scores, read_list, read_number, read_objects

HUMAN = re.compile(r"\s*Human:")


def read_scored(row: Record) -> list[Part]:
    """Read completions and a score of each; a higher score is better."""
    completions = read_list(row, "completions")
    scores = [read_number(score, "scores") for score in read_list(row, "scores")]
    return [{"prompt": row.get("prompt"), "responses": completions, "ranks": rank_scores(scores)}]


def read_ultrafeedback(row: Record) -> list[Part]:
    """Read completions with an overall score each, or else with ratings of several aspects.

    Cui et al. 2023, arXiv 2310.01377.
    """
    completions = read_objects(row, "completions")
    return [
        {
            "prompt": row.get("instruction"),
            "responses": [completion.get("response") for completion in completions],
            "ranks": rank_scores([_read_score(completion) for completion in completions]),
        }
    ]


def _read_score(completion: Record) -> float:
    """Return the overall score of a completion, or the mean rating of its aspects."""
    for name in ("overall_score", "fine-grained_score"):
        if completion.get(name) is not None:
            return read_number(completion[name], name)
    aspects = completion.get("annotations")
    ratings = [
        read_number(aspect.get("Rating"), f"annotations.{name}.Rating")
        for name, aspect in (aspects.items() if isinstance(aspects, dict) else ())
        if isinstance(aspect, dict)
    ]
    if not ratings:
        raise RowError("not-a-number", "a completion has neither overall_score nor annotations with a Rating")
    return fmean(ratings)


def read_nectar(row: Record) -> list[Part]:
    """Read answers with a rank each, 1 is best; the prompt is in hh-rlhf's style."""
    answers = read_objects(row, "answers")
    return [
        {
            "prompt": _read_turns(row.get("prompt")),
            "responses": [answer.get("answer") for answer in answers],
            "ranks": [answer.get("rank") for answer in answers],
        }
    ]


def _read_turns(prompt: Any) -> Any:
    """Return the messages of a prompt in hh-rlhf's style, without the empty turn that ends it."""
    if not isinstance(prompt, str) or not HUMAN.match(prompt):
        return prompt
    turns = parse_turns(prompt)
    return turns[:-1] if not turns[-1]["content"] else turns


def link_oasst(rows: Iterable[Record]) -> Callable[[Record], list[Part]]:
    """Return the function that reads a message of a tree (Köpf et al. 2023, arXiv 2304.07327).

    A reply of the assistant that has a rank is one response of a ranking, and 0 is the best. The messages
    before it, from the root on, are the prompt. `rows` are all messages.
    """
    messages = {row.get("message_id"): row for row in rows if isinstance(row.get("message_id"), str)}

    def read(row: Record) -> list[Part]:
        if row.get("role") != "assistant" or row.get("rank") in (None, ""):
            raise RowError("not-ranked", "is no reply of the assistant that has a rank")
        path: list[Record] = []
        parent = row.get("parent_id")
        while parent not in (None, ""):  # an empty cell of a CSV file is the root's
            if not isinstance(parent, str) or parent not in messages or len(path) > len(messages):
                raise RowError(
                    "wrong-shape", f"parent_id: {preview(parent)} is no earlier message of this file"
                )
            path.append({"role": messages[parent].get("role"), "content": messages[parent].get("text")})
            parent = messages[parent].get("parent_id")
        return [
            {"prompt": path[::-1], "response": row.get("text"), "rank": read_number(row["rank"], "rank") + 1}
        ]

    return read
