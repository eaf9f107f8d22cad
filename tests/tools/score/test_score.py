"""Files scored: the values are those of `RewardModel.score`, whatever the type of file."""

import csv
import json
from datetime import datetime
from pathlib import Path

import pytest
from pyarrow import parquet, schema, table
from pyarrow import types as arrow

from pipeline import RewardModel
from pipeline.tools.score import chunks
from pipeline.tools.score.job import read_job
from tests.tools.score.commands import (
    ROWS,
    jsonl,
    left,
    main,
    rows_of,
)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_row_gets_what_the_model_gives_it(
    suffix: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "in.jsonl", ROWS)
    assert (
        main("score", model, source, f"new/out{suffix}", "--alpha", "-2", "--normalize", "--batch-size", "3")
        == 0
    )
    found = rows_of(Path(f"new/out{suffix}"))
    as_text = str if suffix == ".csv" else lambda value: value
    assert [{**row, "reward": 0} for row in found] == [
        {key: as_text(value) for key, value in row.items()} | {"reward": 0} for row in ROWS
    ]
    expected = RewardModel.load(model).score(
        *zip(*((r["prompt"], r["response"]) for r in ROWS), strict=True), alpha=-2, normalize=True
    )
    assert [float(row["reward"]) for row in found] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 4
    assert capsys.readouterr().out.splitlines()[-1] == f"7 rows written, 0 quarantined: new/out{suffix}"
    assert left(tmp_path / "new") == [f"out{suffix}"]


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.json", "in.parquet"])
def test_every_type_of_file_gives_the_same_rewards(name: str, model: Path, tmp_path: Path) -> None:
    source = tmp_path / name
    if name == "in.json":
        source.write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")
    elif name == "in.parquet":
        parquet.write_table(table({key: [row[key] for row in ROWS] for key in ROWS[0]}), source)
    else:
        with source.open("w", encoding="utf-8-sig", newline="") as lines:  # a BOM, and CRLF after each row
            writer = csv.DictWriter(
                lines, ROWS[0], delimiter="\t" if name == "in.tsv" else ",", quoting=csv.QUOTE_ALL
            )
            writer.writeheader()
            writer.writerows(ROWS)
    assert main("score", model, source, "out.csv") == 0
    assert main("score", model, jsonl(tmp_path / "in.jsonl", ROWS), "same.csv") == 0
    assert Path("out.csv").read_bytes() == Path("same.csv").read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_that_the_output_cannot_hold_are_quarantined_before_any_is_scored(
    suffix: str, tmp_path: Path
) -> None:
    bad = ["[" * 600 + "]" * 600, "1" * 5000, '"\\ud800"', '{"a": 1, "a": 2}', "9" * 30]
    lines = ['{"text": "a", "id": 1}', *(f'{{"text": "b", "id": {value}}}' for value in bad), '{"text": "c"}']
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    found = read_job("score", source, tmp_path / f"out{suffix}", force=False)
    expected = ["unreadable-line", "unreadable-line", "not-unicode", "repeated-key"]
    expected += ["not-writable"] if suffix == ".parquet" else []
    assert [item.fault.reason for item in found.items if item.fault] == expected
    chunks.publish(found, [{"reward": 0.5} for _ in found.valid], {})
    written = rows_of(found.output)
    assert [written[0]["text"], written[-1]["text"]] == ["a", "c"]
    quarantine = (tmp_path / f"out{suffix}.quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in quarantine] == list(range(2, 2 + len(expected)))


@pytest.mark.parametrize("column", ["completion", "text"])
def test_the_answer_may_have_other_names_and_the_prompt_may_be_missing(
    column: str, model: Path, tmp_path: Path
) -> None:
    assert main("score", model, jsonl(tmp_path / "in.jsonl", [{column: "An apple."}]), "out.jsonl") == 0
    (row,) = rows_of(Path("out.jsonl"))
    assert row == {
        column: "An apple.",
        "reward": pytest.approx(RewardModel.load(model).score_response("", "An apple."), abs=1e-5),
    }


def test_parquet_keeps_its_types_and_columns_of_some_rows_come_before_the_reward(
    model: Path, tmp_path: Path
) -> None:
    day = datetime(2024, 5, 1)
    types = schema(
        [("text", "string"), ("n", "int16"), ("x", "float32"), ("day", "timestamp[ms]"), ("none", "string")]
    )
    parquet.write_table(
        table(
            {"text": ["a", "b"], "n": [1, None], "x": [0.5, 1], "day": [day, day], "none": [None, None]},
            types,
        ),
        "in.parquet",
    )
    assert main("score", model, Path("in.parquet"), "out.parquet") == 0
    written = parquet.read_schema("out.parquet")
    assert written.remove(5).equals(types)
    assert arrow.is_float64(written.field("reward").type)
    assert main("score", model, Path("in.parquet"), "out.jsonl") == 0
    assert rows_of(Path("out.jsonl"))[1] | {"reward": 0} == {
        "text": "b",
        "n": None,
        "x": 1,
        "day": str(day),
        "none": None,
        "reward": 0,
    }
    assert (
        main(
            "score",
            model,
            jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b", "tags": ["é", None]}]),
            "out.csv",
        )
        == 0
    )
    with open("out.csv", encoding="utf-8", newline="") as lines:
        (_, *head), (_, none, _), (_, tags, _) = csv.reader(lines)
    assert (head, none, json.loads(tags)) == (["tags", "reward"], "", ["é", None])
