"""Rows with two responses, of which one is preferred. Imports no torch."""

from itertools import zip_longest
from typing import Any

from pipeline.data.dialogues import parse_dialogue
from pipeline.data.messages import preview
from pipeline.data.schema import Record, RowError
from pipeline.data.serialized import read_list_cell
from pipeline.data.shapes.fields import (
    Part,
    compare,
    compare_numbers,
    read_list,
    read_number,
    read_object,
    read_objects,
    read_winner,
)
from pipeline.data.shapes.singles import instruction_of

ARENA_WINNERS = {"model_a": "a", "model_b": "b"} | dict.fromkeys(
    ("tie", "tie (bothbad)", "bothbad", "both_bad"), "tie"
)
KAGGLE_WINNERS = {"winner_model_a": "a", "winner_model_b": "b", "winner_tie": "tie"}


def read_alpaca_pairs(row: Record) -> list[Part]:
    """Read an instruction and its input with two responses; `output` is not read."""
    return [{"prompt": instruction_of(row), "chosen": row.get("chosen"), "rejected": row.get("rejected")}]


def read_sharegpt_pairs(row: Record) -> list[Part]:
    """Read a conversation that ends before the two responses."""
    prompt = read_list(row, "conversations")
    return [{"prompt": prompt, "chosen": row.get("chosen"), "rejected": row.get("rejected")}]


def read_ultrafeedback_pairs(row: Record) -> list[Part]:
    """Read a pair with the scores that chose it; equal scores prefer neither response."""
    chosen, rejected = (read_number(row.get(name), name) for name in ("score_chosen", "score_rejected"))
    if chosen < rejected:
        raise RowError("no-winner", f"score_chosen is {chosen:g}, and score_rejected is {rejected:g}")
    return [compare_numbers(row.get("prompt"), row.get("chosen"), row.get("rejected"), chosen, rejected)]


def read_helpsteer2_pairs(row: Record) -> list[Part]:
    """Read a strength of preference from -3 (`response_1`) to 3 (`response_2`); its size is the margin."""
    return [_compare_strength(row, "prompt", "response_1", "response_2", "preference_strength")]


def read_helpsteer3(row: Record) -> list[Part]:
    """Read the preferences of annotators from -3 (`response1`) to 3 (`response2`) after a context.

    If `individual_preference` has none, `overall_preference` is the only vote.
    """
    names, individual = ("context", "response1", "response2"), "individual_preference"
    votes = [] if row.get(individual) is None else read_objects(row, individual)
    if not votes:
        return [_compare_strength(row, *names, "overall_preference")]
    return [_compare_strength(row | {"score": vote.get("score")}, *names, "score") for vote in votes]


def _compare_strength(row: Record, prompt: str, a: str, b: str, strength: str) -> Record:
    number = read_number(row.get(strength), strength)
    if number not in range(-3, 4):
        raise RowError("no-winner", f"{strength}: expected -3 to 3, found {preview(row[strength])}")
    return compare_numbers(row.get(prompt), row.get(a), row.get(b), -number, number, margin=abs(number))


def read_shp(row: Record) -> list[Part]:
    """Read a post and two comments: `labels` is 1 if readers prefer A (Ethayarajh et al. 2022)."""
    winner = read_winner(row, "labels", {"1": "a", "0": "b"})
    return [compare(row.get("history"), row.get("human_ref_A"), row.get("human_ref_B"), winner)]


def read_pku(row: Record) -> list[Part]:
    """Read two responses and the number of the better one (Ji et al. 2024, arXiv 2406.15513)."""
    winner = read_winner(row, "better_response_id", {"0": "a", "1": "b"})
    return [compare(row.get("prompt"), row.get("response_0"), row.get("response_1"), winner)]


def read_webgpt(row: Record) -> list[Part]:
    """Read a question and two answers with a score each (Nakano et al. 2021, arXiv 2112.09332)."""
    question: Any = row.get("full_text") or row.get("question")
    if not isinstance(question, str) or question.lstrip().startswith("{"):
        question = read_object(row, "question").get("full_text")
    scores = [read_number(row.get(name), name) for name in ("score_0", "score_1")]
    return [compare_numbers(question, row.get("answer_0"), row.get("answer_1"), *scores)]


def read_summaries(row: Record) -> list[Part]:
    """Read a post or an article, two summaries and the number of the better one (Stiennon et al. 2020)."""
    info, summaries = read_object(row, "info"), read_objects(row, "summaries")
    if len(summaries) != 2:
        raise RowError("wrong-shape", f"summaries: expected two, found {len(summaries)}")
    winner = read_winner(row, "choice", {"0": "a", "1": "b"})
    a, b = (summary.get("text") for summary in summaries)
    return [compare(info.get("post") or info.get("article"), a, b, winner)]


def read_arena(row: Record) -> list[Part]:
    """Read two conversations with one user, and which model that user prefers."""
    if "winner" in row:
        winner = read_winner(row, "winner", ARENA_WINNERS)
        conversations = [read_list(row, name) for name in ("conversation_a", "conversation_b")]
    else:
        winner = _read_kaggle_winner(row)
        conversations = [_join_turns(row, name) for name in ("response_a", "response_b")]
    pair = parse_dialogue(*conversations)
    return [compare(pair["prompt"], pair["chosen"], pair["rejected"], winner)]


def _read_kaggle_winner(row: Record) -> str:
    marked = [name for name in KAGGLE_WINNERS if read_number(row.get(name), name)]
    if len(marked) != 1:
        raise RowError("no-winner", f"expected one of {', '.join(KAGGLE_WINNERS)} to be 1")
    return KAGGLE_WINNERS[marked[0]]


def _join_turns(row: Record, name: str) -> list[Record]:
    """Return the conversation of the user's turns in `prompt` and a model's turns in `name`."""
    said, answered = (
        value if isinstance(value, list) else [value]
        for value in map(read_list_cell, (row.get("prompt"), row.get(name)))
    )
    return [
        {"role": role, "content": text}
        for turns in zip_longest(said, answered)
        for role, text in zip(("user", "assistant"), turns, strict=True)
    ]


def read_pandalm(row: Record) -> list[Part]:
    """Read the votes of three annotators on two responses (Wang et al. 2023, arXiv 2306.05087)."""
    return [
        compare(
            instruction_of(row),
            row.get("response1"),
            row.get("response2"),
            read_winner(row, f"annotator{number}", {"1": "a", "2": "b", "0": "tie"}),
        )
        for number in (1, 2, 3)
    ]
