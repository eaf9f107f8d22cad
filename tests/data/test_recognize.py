"""Which format the columns of a file show, and what a user is told if none or several fit."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Source
from pipeline.data.columns import FORMATS
from pipeline.data.readers import read_source
from pipeline.data.shapes.recognize import fitting_formats
from pipeline.errors import UserError
from tests.data.reading import jsonl


@pytest.mark.parametrize(
    ("columns", "formats"),
    [
        ("prompt", "prompts"),
        ("prompt answer id", "prompts"),
        ("prompt better worse", ""),  # a lone prompt does not say what the others are for
        ("prompt completion source", "demonstrations"),
        ("prompt completion score", ""),  # SFT would learn the bad ones too
        ("messages", "demonstrations"),
        ("messages quality", ""),
        ("prompt chosen rejected", "comparisons"),
        ("chosen rejected", "dialogues"),
        ("prompt completion label", "labels"),
        ("text label", "labels"),
        ("messages label", "labels"),
        ("prompt completion rating", "ratings"),
        ("prompt completions labels", "steps"),
        ("question label", "steps"),
        ("prompt response rank", "rankings"),
        ("prompt responses ranks", "rankings"),
        ("prompt completions scores", "scored"),
        ("instruction input output chosen rejected", "alpaca_pairs"),
        ("instruction input output label", "kto"),
        ("instruction input output kto_tag", "kto"),
        ("prompt prompt_id chosen rejected messages score_chosen score_rejected", "ultrafeedback_pairs"),
        ("prompt response helpfulness correctness coherence complexity verbosity", "helpsteer"),
        ("text is_toxic", ""),
        ("prompt chosen rejected answers", "comparisons nectar"),
    ],
)
def test_the_columns_show_the_format(columns: str, formats: str) -> None:
    assert " ".join(fitting_formats(columns.split(), FORMATS)) == formats


def read(folder: Path, row: dict[str, Any], **options: Any) -> Any:
    return read_source(Source(path=str(jsonl(folder / "a.jsonl", [row])), **options))[0].record


def test_a_mapping_counts_as_its_column(tmp_path: Path) -> None:
    row = {"text": "rude", "toxic": "yes"}
    assert read(tmp_path, row, columns={"label": "toxic"})["completion"] == "rude"
    row = {"instruction": "Q", "input": "x", "output": "a", "chosen": "a", "rejected": "b"}
    record = read(tmp_path, row, columns={"prompt": "input"})
    assert record == {"prompt": "x", "chosen": "a", "rejected": "b"}
    record = read(tmp_path, row, ignore=["chosen", "rejected"])
    assert record == {"prompt": "Q\n\nx", "completion": "a"}


SHP = {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "a", "is_toxic": 1},
            {},
            r"a\.jsonl: no format has its columns: text, is_toxic; nearly: labels lacks 'label'; map them "
            r"with 'format' and 'columns' of the source, or see rlhf prepare --inspect .*a\.jsonl$",
        ),
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b", "answers": []},
            {},
            r"a\.jsonl: its columns fit comparisons and nectar; pick one, such as format: comparisons$",
        ),
        (
            SHP,
            {"classes": ["bad", "good"]},
            r"'classes' is not read with format shp, which its columns show$",
        ),
        (
            SHP,
            {"format": "comparisons"},
            r"needs a column 'prompt', found history, .*; format: shp reads them$",
        ),
        (
            {"prompt": "Q", "complexity": 1},
            {"format": "demonstrations"},
            r"needs a column 'completion', .* use columns: \{completion: THEIRS\}$",
        ),
        (
            {"prompt": "Q", "completions": ["a"]},
            {"format": "demonstrations"},
            r"needs a column 'completion', .* use columns: \{completion: THEIRS\}$",
        ),
        (
            {"prompt": "Q", "Completion": "a"},
            {"format": "demonstrations"},
            r"use columns: \{completion: Completion\}$",
        ),
        (
            {"prompt": "Q", "completions": ["a", "b"], "scores": [5, 1]},
            {"format": "rankings", "columns": {"responses": "completions", "ranks": "scores"}},
            r"columns maps 'ranks' to 'scores': a high score is good, a high rank is not; format: scored",
        ),
    ],
)
def test_what_a_user_is_told(tmp_path: Path, row: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, row, **options)


def test_a_file_without_a_row_that_can_be_read_has_no_format(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("nonsense\n", encoding="utf-8")
    (item,) = read_source(Source(path=str(path)))
    assert str(item.fault).startswith("unreadable-line")
    path.write_text("", encoding="utf-8")
    assert read_source(Source(path=str(path))) == []
