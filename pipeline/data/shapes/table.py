"""The shapes in which feedback is published, as data. Imports no torch.

A shape is recognized by its columns. Its function turns a row into records, or into the reasons why parts of
the row give none. To add one: a function, an entry here, its name in `Format` (`pipeline/config/prepare.py`),
and a sample in docs/data-shapes.md.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from pipeline.data.schema import Record
from pipeline.data.shapes.annotations import read_argilla, read_label_studio
from pipeline.data.shapes.fields import Part
from pipeline.data.shapes.groups import link_oasst, read_nectar, read_scored, read_ultrafeedback
from pipeline.data.shapes.pairs import (
    read_alpaca_pairs,
    read_arena,
    read_helpsteer2_pairs,
    read_helpsteer3,
    read_pandalm,
    read_pku,
    read_sharegpt_pairs,
    read_shp,
    read_summaries,
    read_ultrafeedback_pairs,
    read_webgpt,
)
from pipeline.data.shapes.singles import (
    ATTRIBUTES,
    read_alpaca,
    read_helpsteer,
    read_kto,
    read_sharegpt,
)

Read = Callable[[Record], list[Part]]


class Shape(NamedTuple):
    """The kinds of records that a shape gives, its function, and the columns that show it.

    The function reads a row; if a row needs the others, it is `link(rows)`. `columns` has one or more sets: a
    file with all columns of a set has the shape. `known` names other columns of the published rows, which may
    be missing; `*` stands for any.
    """

    kinds: tuple[str, ...]
    read: Read | None
    columns: tuple[tuple[str, ...], ...]
    known: tuple[str, ...] = ()
    link: Callable[[Iterable[Record]], Read] | None = None


JUDGED = ("comparisons", "rankings", "ratings")
PAIRS = ("comparisons",)

SHAPES: dict[str, Shape] = {
    "alpaca": Shape(("demonstrations",), read_alpaca, (("instruction", "output"),), ("input",)),
    "alpaca_pairs": Shape(
        PAIRS, read_alpaca_pairs, (("instruction", "chosen", "rejected"),), ("input", "output")
    ),
    "sharegpt": Shape(("demonstrations",), read_sharegpt, (("conversations",),)),
    "sharegpt_pairs": Shape(PAIRS, read_sharegpt_pairs, (("conversations", "chosen", "rejected"),)),
    "kto": Shape(
        ("labels",),
        read_kto,
        (
            ("conversations", "label"),
            ("conversations", "kto_tag"),
            ("messages", "kto_tag"),
            ("instruction", "output", "kto_tag"),
            ("instruction", "output", "label"),
        ),
        ("input",),
    ),
    "scored": Shape(("rankings",), read_scored, (("prompt", "completions", "scores"),)),
    "ultrafeedback": Shape(("rankings",), read_ultrafeedback, (("instruction", "completions"),)),
    "ultrafeedback_pairs": Shape(
        PAIRS,
        read_ultrafeedback_pairs,
        (("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),),
        ("prompt_id", "messages"),
    ),
    "helpsteer": Shape(("ratings",), read_helpsteer, (("prompt", "response", "helpfulness"),), ATTRIBUTES),
    "helpsteer2_pairs": Shape(
        PAIRS, read_helpsteer2_pairs, (("prompt", "response_1", "response_2", "preference_strength"),)
    ),
    "helpsteer3": Shape(
        PAIRS,
        read_helpsteer3,
        (("context", "response1", "response2", "overall_preference"),),
        ("individual_preference",),
    ),
    "shp": Shape(
        PAIRS, read_shp, (("history", "human_ref_A", "human_ref_B", "labels"),), ("score_A", "score_B")
    ),
    "nectar": Shape(("rankings",), read_nectar, (("prompt", "answers"),)),
    "oasst": Shape(
        ("rankings",), None, (("message_id", "parent_id", "text", "role", "rank"),), ("labels",), link_oasst
    ),
    "pku_saferlhf": Shape(
        PAIRS,
        read_pku,
        (("prompt", "response_0", "response_1", "better_response_id"),),
        ("safer_response_id",),
    ),
    "webgpt": Shape(
        PAIRS, read_webgpt, (("answer_0", "answer_1", "score_0", "score_1"),), ("question", "full_text")
    ),
    "summaries": Shape(PAIRS, read_summaries, (("info", "summaries", "choice"),)),
    "arena": Shape(
        PAIRS,
        read_arena,
        (
            ("conversation_a", "conversation_b", "winner"),
            ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
        ),
        ("model_a", "model_b"),
    ),
    "pandalm": Shape(
        PAIRS,
        read_pandalm,
        (("instruction", "response1", "response2", "annotator1", "annotator2", "annotator3"),),
        ("input",),
    ),
    "label_studio": Shape(
        JUDGED,
        read_label_studio,
        (("data", "annotations"), ("annotation_id", "annotator", "lead_time")),
        ("prompt", "*"),
    ),
    "argilla": Shape(JUDGED, read_argilla, (("fields", "responses"), ("id", "_server_id")), ("prompt", "*")),
}


def shape_reader(format: str, rows: Iterable[Record]) -> Read | None:
    """Return the function that reads a row of a shape, or None if the format is none. `rows` are all rows."""
    shape = SHAPES.get(format)
    return shape and (shape.link(rows) if shape.link else shape.read)


def kind_of(shape: Shape, record: Record) -> str:
    """Return the kind of a record that a shape gave, by its columns."""
    marks = {"comparisons": "chosen", "rankings": "responses", "ratings": "rating", "labels": "label"}
    return next((kind for kind in shape.kinds if marks.get(kind) in record), shape.kinds[0])
