"""Records of steps, and prompts with an answer, as `prepare` publishes them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import List, Value, load_from_disk

from pipeline.config import PrepareStage
from pipeline.errors import UserError
from pipeline.prepare.stage import run


def prepare(folder: Path, rows: list[Any], format: str = "steps", **options: Any) -> Path:
    path = folder / f"{format}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"format": format, "path": str(path), **options}
    return run(PrepareStage(run="test", runs=str(folder / "runs"), source=[source]))


def rows_of(published: Path, kind: str) -> list[Any]:
    """Return the rows of all splits, sorted by prompt."""
    rows = [row for split in load_from_disk(str(published / kind)).values() for row in split]
    return sorted(rows, key=lambda row: str(row["prompt"]))


def test_steps_are_published_with_their_types_and_prompts_derived(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{n % 10}", "completions": ["a", f"b{n}"], "labels": [1, n % 2], "task": "sums"}
        for n in range(20)
    ]
    published = prepare(tmp_path, rows)
    data = load_from_disk(str(published / "steps"))
    assert data["test"].features == {
        "prompt": Value("string"),
        "completions": List(Value("string")),
        "labels": List(Value("bool")),
    }
    assert {split: len(part) for split, part in data.items()} == {"train": 16, "validation": 2, "test": 2}
    found = sorted(rows_of(published, "steps"), key=lambda row: int(row["completions"][1][1:]))
    assert found == [
        {"prompt": f"Q{n % 10}", "completions": ["a", f"b{n}"], "labels": [True, n % 2 == 1]}
        for n in range(20)
    ]
    prompts = load_from_disk(str(published / "prompts"))
    for split, part in data.items():
        assert set(part["prompt"]) == set(prompts[split]["prompt"])
    assert sorted(path.name for path in published.iterdir() if path.is_dir()) == ["prompts", "steps"]


def test_a_prompt_of_messages_leaves_the_steps_strings(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Q1"}]
    rows = [
        {"prompt": turns, "completions": ["a"], "labels": [True]},
        {"prompt": "Q2", "completions": ["b"], "labels": [False]},
    ]
    assert rows_of(prepare(tmp_path, rows), "steps") == [
        rows[0],
        rows[1] | {"prompt": [{"role": "user", "content": "Q2"}]},
    ]


def test_an_answer_is_kept_where_a_prompt_has_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+1=", "answer": n + 1} for n in range(9)] + [{"prompt": "9+1="}]
    published = prepare(tmp_path, rows, "prompts")
    assert load_from_disk(str(published / "prompts"))["train"].features["answer"] == Value("string")
    assert {row["prompt"]: row["answer"] for row in rows_of(published, "prompts")} == {
        **{f"{n}+1=": str(n + 1) for n in range(9)},
        "9+1=": None,
    }


def test_prompts_without_an_answer_have_no_such_column(tmp_path: Path) -> None:
    published = prepare(tmp_path, [{"prompt": "Q", "answer": ""}, {"prompt": "R"}], "prompts")
    assert load_from_disk(str(published / "prompts"))["train"].column_names == ["prompt"]


def test_a_file_of_steps_without_labels_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format steps needs a column 'labels', found prompt, completions;"):
        prepare(tmp_path, [{"prompt": "Q", "completions": ["a"]}])
