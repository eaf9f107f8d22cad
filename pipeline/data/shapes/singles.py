"""Rows with one response: to imitate, to accept or decline, or to rate. Imports no torch."""

from pipeline.data.schema import Record
from pipeline.data.shapes.fields import Part, join_texts, read_list, read_number

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def instruction_of(row: Record) -> str:
    """Return the prompt of Alpaca's columns: the instruction, and its input if there is one."""
    return join_texts([row.get("instruction"), row.get("input")])  # type: ignore[no-any-return]


def read_alpaca(row: Record) -> list[Part]:
    """Read an instruction, its input and the output."""
    return [{"prompt": instruction_of(row), "completion": row.get("output")}]


def read_sharegpt(row: Record) -> list[Part]:
    """Read a conversation, which ends with the response."""
    conversation = read_list(row, "conversations")
    return [{"prompt": conversation[:-1], "completion": conversation[-1:]}]


def read_kto(row: Record) -> list[Part]:
    """Read a conversation, or Alpaca's columns, and whether the response is accepted."""
    label = row["kto_tag"] if "kto_tag" in row else row.get("label")
    for name in ("conversations", "messages"):
        if name in row:
            turns = read_list(row, name)
            return [{"prompt": turns[:-1], "completion": turns[-1:], "label": label}]
    return [{"prompt": instruction_of(row), "completion": row.get("output"), "label": label}]


def read_attributes(row: Record) -> dict[str, float]:
    """Return the rating of each attribute of HelpSteer that the row has."""
    return {name: read_number(row[name], name) for name in ATTRIBUTES if row.get(name) is not None}


def read_helpsteer(row: Record) -> list[Part]:
    """Read a response with its attributes, of which `helpfulness` is the rating.

    Wang et al. 2023, arXiv 2311.09528.
    """
    rating = read_attributes(row).get("helpfulness")
    return [{"prompt": row.get("prompt"), "completion": row.get("response"), "rating": rating}]
