"""`source.map`: rows that a function of the user makes of raw rows."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import PrepareStage, Source
from pipeline.data.readers import read_source
from pipeline.errors import UserError
from pipeline.prepare import stage
from pipeline.prepare.inspection import inspect_file

MODULE = """
def read(row):
    if row["verdict"] == "skip":
        return None
    if row["verdict"] == "crash":
        return row["missing"]
    if row["verdict"] == "number":
        return 3
    if row["verdict"] == "lambda":
        return {"prompt": lambda: 1}
    if row["verdict"] == "digits":
        return {"prompt": "Q", "n": [10**5000]}
    if row["verdict"] == "deep":
        deep = []
        for _ in range(200):
            deep = [deep]
        return {"prompt": "Q", "n": deep}
    pair = {"prompt": row["ask"], "chosen": row["texts"][0], "rejected": row["texts"][1]}
    row.clear()
    return [pair] * (2 if row.get("verdict") is None and pair["prompt"] == "Q2" else 1)

def rank(row):
    return {"prompt": row["ask"], "response": row["texts"][0], "rank": 1}

def generate(row):
    yield row

class Reader:
    def __call__(self, row):
        return read(row)

constant, reader = 3, Reader()
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write rows of these verdicts, and the module `mapped_rows_N` beside them; return a source of both."""
    monkeypatch.chdir(tmp_path)
    name = f"mapped_rows_{os.path.basename(tmp_path)}"
    Path(f"{name}.py").write_text(MODULE)

    def write(*verdicts: str, function: str = "read", **options: Any) -> Source:
        data = [
            {"ask": f"Q{n}", "texts": [f"yes {n}", f"no {n}"], "verdict": verdict}
            for n, verdict in enumerate(verdicts, 1)
        ]
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        return Source(path="a.jsonl", map=f"{name}:{function}", **options)

    return write


def test_a_row_may_give_a_row_several_or_none(rows: Any) -> None:
    items = read_source(rows("first", "first", "skip"))
    outcomes = [item.fault.reason if item.fault else item.record for item in items]
    pairs = [{"prompt": f"Q{n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in (1, 2)]
    assert outcomes == [pairs[0], pairs[1], pairs[1], "not-mapped"]
    assert [item.is_first for item in items] == [True, True, False, True]
    assert items[1].rows[0].data["verdict"] == "first"  # the row as read, whatever the function changed


def test_a_failure_names_the_function_and_its_line(rows: Any) -> None:
    crash, number, unstorable = read_source(rows("crash", "number", "lambda"))
    assert crash.fault
    assert number.fault
    assert unstorable.fault
    module = crash.fault.detail.partition(":")[0]
    assert crash.fault.reason == number.fault.reason == "map-failed"
    assert crash.fault.detail.startswith(f"{module}:read: KeyError: 'missing', at ")
    assert crash.fault.detail.endswith(f"{module}.py, line 6")
    assert number.fault.detail == (
        f"{module}:read: returned a int; expected a row (a dict), a list of rows, or None"
    )
    assert unstorable.fault.reason == "map-failed"


def test_a_row_that_cannot_be_written_is_quarantined(rows: Any) -> None:
    kept, digits, deep = read_source(rows("first", "digits", "deep"))
    assert kept.fault is None
    assert digits.fault
    assert deep.fault
    assert digits.fault.reason == deep.fault.reason == "map-failed"
    assert "read: returned a value that no file can hold: Exceeds the limit" in digits.fault.detail
    assert deep.fault.detail.endswith("read: returned a row that is nested more than 100 deep")


def test_every_row_is_counted_once(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = rows("first", "first", "skip", "crash")
    config = PrepareStage(run="t", source=[source], splits={"validation": 0, "test": 0})
    counts = json.loads((stage.run(config) / "manifest.json").read_text())["rows"]
    assert {name: counts[name] for name in ("read", "kept", "merged", "quarantined")} == {
        "read": 4,
        "kept": 2,
        "merged": 0,
        "quarantined": {"map-failed": 1, "not-mapped": 1},
    }
    assert f"a.jsonl: rows are mapped by {source.map}" in capsys.readouterr().out


def test_a_changed_function_makes_the_records_again(rows: Any) -> None:
    source = rows("first")
    config = PrepareStage(run="t", source=[source], splits={"validation": 0, "test": 0})
    before = json.loads((stage.run(config) / "manifest.json").read_text())["inputs"][source.map]
    file = Path(f"{source.map.partition(':')[0]}.py")
    file.write_text(f"{MODULE}# changed\n")
    after = json.loads((stage.run(config) / "manifest.json").read_text())["inputs"][source.map]
    assert after["identity"] != before["identity"]


def test_a_map_that_is_no_function_is_one_line(rows: Any) -> None:
    for function, message in {
        "missing": "has no attribute 'missing'",
        "constant": "is a int, expected",
    }.items():
        with pytest.raises(UserError, match=message):
            stage.check(PrepareStage(run="t", source=[rows("first", function=function)]))
    with pytest.raises(UserError, match="return the lists 'responses' and 'ranks' of a ranking in one row"):
        read_source(rows("first", function="rank", format="rankings"))


def test_inspect_shows_the_config_with_the_map(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = rows("first", format="comparisons")
    inspect_file(PrepareStage(run="t", source=[source]))
    output = capsys.readouterr().out
    assert "1 of 1 rows kept, as comparisons 1" in output
    assert f"map: {source.map}" in output


def test_an_object_that_can_be_called_maps_and_a_generator_is_told(rows: Any) -> None:
    source = rows("first", function="reader")
    config = PrepareStage(run="t", source=[source], splits={"validation": 0, "test": 0})
    assert json.loads((stage.run(config) / "manifest.json").read_text())["rows"]["kept"] == 1
    (item,) = read_source(rows("first", function="generate", format="comparisons"))
    assert item.fault
    assert "returned a generator; expected a row" in item.fault.detail
