"""Rows that cannot be kept end in the quarantine, and are counted."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import Source
from pipeline.data.labels import class_names
from pipeline.data.quarantine import count_and_quarantine
from pipeline.data.readers import read_source
from pipeline.data.sources import iter_rows
from pipeline.data.validation import validate_records
from pipeline.errors import UserError
from pipeline.prepare.stage import _require_valid_rows
from tests.prepare.publishing import (
    manifest,
    prepare,
    quarantined,
)


def test_every_faulty_row_is_in_the_quarantine(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = {"prompt": "Q", "completion": "a"}
    lines = [
        json.dumps(good),
        "{broken",
        json.dumps(good),
        json.dumps({"prompt": "\udce9", "completion": float("nan")}),
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    published = prepare(tmp_path, {"format": "demonstrations", "path": str(path)})
    assert [(entry["source"], entry["line"], entry["reason"]) for entry in quarantined(published)] == [
        (str(path), 2, "unreadable-line"),
        (str(path), 3, "duplicate"),
        (str(path), 4, "not-unicode"),
    ]
    assert quarantined(published)[0]["row"] == "{broken"
    assert quarantined(published)[1]["detail"] == f"the same as {path}:1"
    assert quarantined(published)[2]["row"] == {"prompt": "\\udce9", "completion": "nan"}
    counts = manifest(published)["rows"]
    assert (counts["read"], counts["kept"]) == (4, 1)
    assert counts["quarantined"] == {"duplicate": 1, "not-unicode": 1, "unreadable-line": 1}


def test_a_quarantined_ranking_takes_all_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,rank\nQ,a,1\nR,c,1\nQ,b,first\nR,d,2\nS,e,1\n", encoding="utf-8")
    published = prepare(tmp_path, {"format": "rankings", "path": str(path)})
    assert [(entry["line"], entry["reason"]) for entry in quarantined(published)] == [
        (2, "not-a-rank"),
        (4, "not-a-rank"),
        (6, "too-few-answers"),
    ]
    counts = manifest(published)["rows"]
    assert (counts["read"], counts["kept"], counts["quarantined"]) == (
        5,
        2,
        {"not-a-rank": 2, "too-few-answers": 1},
    )


def test_bad_rows_of_every_kind_end_in_the_quarantine(tmp_path: Path) -> None:
    rows = [
        '{"prompt": "Q"}',
        '{"prompt": ' + "[" * 600 + "]" * 600 + "}",
        '{"prompt": ' + "1" * 5000 + "}",
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "\\ud800"}',
        '{"\\ud800": "Q"}',
        '{"prompt": NaN}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    published = prepare(tmp_path, {"format": "prompts", "path": str(tmp_path / "a.jsonl")})
    assert [entry["reason"] for entry in quarantined(published)] == [
        "unreadable-line",
        "unreadable-line",
        "repeated-key",
        "not-unicode",
        "not-text",
        "not-text",
    ]
    assert [entry["row"] for entry in quarantined(published)][3:] == [
        {"prompt": "\\ud800"},
        {"\\ud800": "Q"},
        {"prompt": "nan"},
    ]


VALUE = st.none() | st.integers(-1, 3) | st.floats() | st.text(max_size=2) | st.sampled_from(["Q", "R"])
FORMATS = {
    "comparisons": ("prompt", "chosen", "rejected"),
    "dialogues": ("chosen", "rejected"),
    "rankings": ("prompt", "response", "rank"),
    "ratings": ("prompt", "completion", "rating"),
    "labels": ("prompt", "completion", "label"),
    "demonstrations": ("messages",),
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_kept_and_quarantined_add_up_to_read_on_junk(
    tmp_path: Path, format: str, data: st.DataObject
) -> None:
    junk = (
        st.fixed_dictionaries(dict.fromkeys(FORMATS[format], VALUE)).map(json.dumps)
        | st.text(max_size=5)
        | st.sampled_from(["[]", "{}", "{"])
    )
    lines = data.draw(st.lists(junk, min_size=1, max_size=10))
    path = tmp_path / "junk.jsonl"
    path.write_text(
        "\n".join([json.dumps(dict.fromkeys(FORMATS[format], "Q")), *lines]),
        encoding="utf-8",
        errors="surrogatepass",
    )
    source = Source(format=format, path=str(path))
    read = len(list(iter_rows(source)))
    items = read_source(source)
    validate_records(items, class_names([source], [item.record.get("label") for item in items]))
    kept = sum(len(item.rows) for item in items if not item.fault)
    merged = sum(bool(item.fault) and item.fault.reason == "merged" for item in items)
    judged = [(row, item.fault) for item in items for row in item.rows]
    if not kept:
        with pytest.raises(UserError, match=f"of {read} rows none"):
            _require_valid_rows(source, items)
        return
    counts = count_and_quarantine(judged, tmp_path / "quarantine.jsonl")
    assert counts["read"] == read
    assert (counts["kept"], counts["merged"]) == (kept, merged)
    assert read == kept + merged + len(quarantined(tmp_path))
    assert sum(counts["quarantined"].values()) == len(quarantined(tmp_path))
    names = ("read", "kept", "merged", "quarantined")
    assert counts["by_source"] == {str(path): {key: counts[key] for key in names}}
