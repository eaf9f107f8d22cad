"""Published files as users bring them; REAL_DATA names the folder that holds them."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from pipeline.cli import main
from pipeline.config import PrepareStage, Source
from pipeline.data.readers import ParsedRecord, read_source
from pipeline.prepare.stage import run

DATA = Path(os.environ.get("REAL_DATA", "."))
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA is not set"),
]
ALPACA = ["instruction", "input"]


@pytest.mark.parametrize(
    ("path", "format", "read", "kept"),
    [
        ("hh-harmless/pairs.jsonl", "dialogues", 1800, 1798),
        ("rasbt/instruction-data-with-preference.json", "alpaca_pairs", 1100, 1094),
        ("rasbt/instruction-data.json", "alpaca", 1100, 1100),
        ("kto-demo/kto_en_demo.json", "labels", 300, 300),
    ],
)
def test_a_published_file_is_recognized(path: str, format: str, read: int, kept: int, capsys: Any) -> None:
    assert main(["prepare", "--inspect", str(DATA / path)]) == 0
    output = capsys.readouterr().out
    assert f"  {kept:,} of {read:,} rows kept, as " in output
    assert f"source:\n  format: {format}\n" in output


def test_pandalm_gives_a_comparison_for_each_vote() -> None:
    votes = read_source(Source(path=str(DATA / "pandalm/testset-v1.json")))
    assert len(votes) == 3 * 999
    assert not any(item.fault for item in votes)
    ties = sum(item.record.get("preference") == 0.5 for item in votes)
    assert ties == sum(annotators(item).count(0) for item in votes[::3])
    majority = Counter(
        max(set(verdicts), key=verdicts.count) for verdicts in (annotators(item) for item in votes[::3])
    )
    assert (majority[1], majority[2]) == (422, 472)


def annotators(item: ParsedRecord) -> list[int]:
    return [item.rows[0].data[f"annotator{number}"] for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("finegrained-qa/dev_feedback.json", "no format has its columns: question, passages, gold, "),
        (
            "surge-toxicity/toxicity_en.csv",
            "no format has its columns: text, is_toxic; nearly: labels lacks 'label'",
        ),
    ],
)
def test_a_file_in_no_known_shape_is_one_line(path: str, message: str, capsys: Any) -> None:
    assert main(["prepare", "--inspect", str(DATA / path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def prepare(folder: Path, format: str, path: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The artifact of one file, and its counts."""
    published = run(
        PrepareStage(
            run="real", runs=str(folder), source=[{"format": format, "path": str(DATA / path), **options}]
        )
    )
    return published, json.loads((published / "manifest.json").read_text(encoding="utf-8"))["rows"]


def rows_of(published: Path, kind: str) -> list[Any]:
    return [row for split in load_from_disk(str(published / kind)).values() for row in split]


def test_hh_harmless(tmp_path: Path) -> None:
    published, counts = prepare(tmp_path, "dialogues", "hh-harmless/pairs.jsonl")
    assert (counts["read"], counts["kept"], counts["quarantined"]) == (1800, 1798, {"empty-text": 2})
    assert counts["derived"] == {"demonstrations": 1798, "prompts": 1796}
    for row in rows_of(published, "comparisons"):
        assert row["prompt"][0]["role"] == "user"
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]


def test_rasbt_pairs(tmp_path: Path) -> None:
    published, counts = prepare(
        tmp_path, "comparisons", "rasbt/instruction-data-with-preference.json", columns={"prompt": ALPACA}
    )
    assert (counts["read"], counts["kept"], counts["quarantined"]) == (1100, 1094, {"identical-answers": 6})
    assert len(rows_of(published, "comparisons")) == 1094


def test_rasbt_demonstrations(tmp_path: Path) -> None:
    columns = {"prompt": ALPACA, "completion": "output"}
    _, counts = prepare(tmp_path, "demonstrations", "rasbt/instruction-data.json", columns=columns)
    assert (counts["read"], counts["kept"], counts["derived"]) == (1100, 1100, {"prompts": 1075})


def test_surge_toxicity(tmp_path: Path) -> None:
    published, counts = prepare(
        tmp_path,
        "labels",
        "surge-toxicity/toxicity_en.csv",
        columns={"label": "is_toxic"},
        classes=["Not Toxic", "Toxic"],
    )
    assert (counts["read"], counts["kept"], counts["merged"], counts["quarantined"]) == (1000, 999, 1, {})
    labels = Counter(row["label"] for row in rows_of(published, "labels"))
    (again,) = (json.loads(line) for line in (published / "merged_rows.jsonl").open(encoding="utf-8"))
    labels[["Not Toxic", "Toxic"].index(again["row"]["is_toxic"])] += 1
    assert labels == {1: 501, 0: 499}


def test_kto_demo(tmp_path: Path) -> None:
    published, counts = prepare(tmp_path, "labels", "kto-demo/kto_en_demo.json")
    assert (counts["read"], counts["kept"]) == (300, 300)
    assert Counter(row["label"] for row in rows_of(published, "labels")) == {0: 150, 1: 150}
    assert load_from_disk(str(published / "labels"))["train"].features["label"].names == ["false", "true"]


@pytest.mark.parametrize(
    ("response", "kept", "quarantined"),
    [
        ("response1", 484, {"duplicate": 482, "empty-text": 29, "not-text": 4}),
        ("response2", 505, {"duplicate": 467, "empty-text": 25, "not-text": 2}),
    ],
)
def test_pandalm_answers(tmp_path: Path, response: str, kept: int, quarantined: dict[str, int]) -> None:
    columns = {"prompt": ALPACA, "completion": response}
    _, counts = prepare(tmp_path, "demonstrations", "pandalm/testset-v1.json", columns=columns)
    assert (counts["read"], counts["kept"], counts["quarantined"]) == (999, kept, quarantined)


def test_finegrained_qa_questions(tmp_path: Path) -> None:
    _, counts = prepare(
        tmp_path, "prompts", "finegrained-qa/dev_feedback.json", columns={"prompt": "question"}
    )
    assert (counts["read"], counts["kept"]) == (500, 500)
