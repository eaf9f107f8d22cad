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
    assert load_from_disk(str(published / "prompts"))["train"].features["answer"] == Value("int64")
    assert {row["prompt"]: row["answer"] for row in rows_of(published, "prompts")} == {
        **{f"{n}+1=": n + 1 for n in range(9)},
        "9+1=": None,
    }


def test_a_file_of_steps_without_labels_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format steps needs a column 'labels', found prompt, completions;"):
        prepare(tmp_path, [{"prompt": "Q", "completions": ["a"]}])


def trajectory(problem: str, *ratings: int | None, **label: Any) -> dict[str, Any]:
    """Return a row of PRM800K with one step; its first completion is the chosen one."""
    completions = [{"text": f"s{n}", "rating": rating, "flagged": None} for n, rating in enumerate(ratings)]
    step = {"completions": completions, "human_completion": None, "chosen_completion": 0}
    return {
        "labeler": "x",
        "generation": None,
        "question": {"problem": problem, "ground_truth_answer": "7"},
        "label": {"steps": [step], "finish_reason": "solution", **label},
    }


def test_a_row_is_kept_if_one_of_its_records_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        trajectory("Q", 1, -1, None),  # two records, and one that is left out
        trajectory("Q", 1, 1),  # contradicts the second record of line 1, and repeats the first
        trajectory("P", None, None),
        trajectory("O", 1, finish_reason="bad_problem"),
    ]
    published = prepare(tmp_path, rows)
    answers = {"Q": "7"}
    assert [(row["completions"], row["labels"]) for row in rows_of(published, "steps")] == [(["s0"], [True])]
    assert {row["prompt"]: row["answer"] for row in rows_of(published, "prompts")} == answers

    counts = json.loads((published / "manifest.json").read_text())["rows"]
    assert (counts["read"], counts["kept"]) == (4, 1)
    assert counts["quarantined"] == {"bad-problem": 1, "contradiction": 1, "no-rating": 1}
    assert counts["left_out"] == {"contradiction": 1, "no-rating": 1}
    lines = [json.loads(line) for line in (published / "quarantine.jsonl").open()]
    assert [(line["line"], line["reason"]) for line in lines] == [
        (2, "contradiction"),
        (3, "no-rating"),
        (4, "bad-problem"),
    ]
    printed = capsys.readouterr().out
    assert "  1 of 4 rows kept; quarantined: bad-problem 1, contradiction 1, no-rating 1; see " in printed
    assert "  left out of these: contradiction 1, no-rating 1\n" in printed


def test_rows_of_math_shepherd_are_read_as_they_are(tmp_path: Path) -> None:
    rows = [
        {
            "input": f"What is {n}+1? Step 1: {n}+1={n + 1} ки\nStep 2: The answer is: 9 ки",
            "label": f"What is {n}+1? Step 1: {n}+1={n + 1} +\nStep 2: The answer is: 9 {'-+'[n == 8]}",
            "task": "GSM8K",
        }
        for n in range(7, 10)
    ]
    assert rows_of(prepare(tmp_path, rows), "steps") == [
        {
            "prompt": f"What is {n}+1?",
            "completions": [f"Step 1: {n}+1={n + 1}", "Step 2: The answer is: 9"],
            "labels": [True, n == 8],
        }
        for n in range(7, 10)
    ]


def test_lists_in_the_cells_of_a_csv_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completions,labels\nQ,"[\'a\', \'b\']","[True, False]"\nP,"[""c""]",[0]\n')
    source = {"format": "steps", "path": str(path)}
    published = run(PrepareStage(run="test", runs=str(tmp_path / "runs"), source=[source]))
    assert rows_of(published, "steps") == [
        {"prompt": "P", "completions": ["c"], "labels": [False]},
        {"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]},
    ]
