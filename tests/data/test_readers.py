"""Each format by hand-made examples."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline.config import Source
from pipeline.errors import UserError
from pipeline.prepare import stage
from tests.data.reading import assistant, faults, jsonl, read, records, user


def test_comparisons_with_mapped_and_joined_columns(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "good": "2", "rejected": "3", "margin": 0.5, "other": 1},
        {"instruction": "Greet.", "input": "", "good": "Hi", "rejected": "No", "margin": None, "other": 1},
        {"instruction": "Wave.", "input": "  ", "good": "o/", "rejected": "No"},
    ]
    columns = {"prompt": ["instruction", "input"], "chosen": "good"}
    found = records("comparisons", jsonl(tmp_path / "a.jsonl", rows), columns=columns)
    assert found[0] == {
        "prompt": "Add.\n\n1 + 1",
        "chosen": "2",
        "rejected": "3",
        "margin": 0.5,
    }
    assert [record["prompt"] for record in found] == ["Add.\n\n1 + 1", "Greet.", "Wave."]


@pytest.mark.parametrize("value", [0, False, ["x"]])
def test_a_joined_column_that_is_not_text_is_left_for_the_checks(tmp_path: Path, value: Any) -> None:
    found = records(
        "prompts", jsonl(tmp_path / "a.jsonl", [{"a": "x", "b": value}]), columns={"prompt": ["a", "b"]}
    )
    assert found == [{"prompt": value}]


def test_rankings_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}]
    assert records("rankings", jsonl(tmp_path / "a.jsonl", rows)) == rows


def test_rankings_by_answer_are_grouped_wherever_their_rows_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,rank\nQ,a,2\nR,x,1\nQ,b,1\nR,y,2\nQ,a,2\n", encoding="utf-8")
    items = read("rankings", path)
    assert [item.record for item in items[:2]] == [
        {"prompt": "Q", "responses": ["a", "b"], "ranks": ["2", "1"]},
        {"prompt": "R", "responses": ["x", "y"], "ranks": ["1", "2"]},
    ]
    assert [[row.line for row in item.rows] for item in items] == [[2, 4], [3, 5], [6]]
    assert faults(items) == [(6, "duplicate")]


def test_ratings_and_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "completion": "a", "rating": 3.5}]
    assert records("ratings", jsonl(tmp_path / "a.jsonl", rows)) == rows
    assert records("prompts", jsonl(tmp_path / "a.jsonl", rows)) == rows


def test_labels_in_three_shapes(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "completion": "a", "label": True}]
    assert records("labels", jsonl(tmp_path / "a.jsonl", rows)) == rows
    (text,) = records(
        "labels", jsonl(tmp_path / "b.jsonl", [{"text": "rude", "toxic": "yes"}]), columns={"label": "toxic"}
    )
    assert (text["prompt"], text["completion"], text["label"]) == ("", "rude", "yes")
    for whole in ([user("Q"), assistant("a")], repr([user("Q"), assistant("a")])):
        (chat,) = records("labels", jsonl(tmp_path / "b.jsonl", [{"text": whole, "label": 0}]))
        assert (chat["prompt"], chat["completion"]) == ([user("Q")], [assistant("a")])
    (chat,) = records(
        "labels", jsonl(tmp_path / "c.jsonl", [{"messages": [user("Q"), assistant("a")], "label": 0}])
    )
    assert (chat["prompt"], chat["completion"], chat["label"]) == ([user("Q")], [assistant("a")], 0)


def test_demonstrations_as_pairs_and_as_messages(tmp_path: Path) -> None:
    rows = [{"instruction": "Q", "input": None, "output": "a"}]
    columns = {"prompt": ["instruction", "input"], "completion": "output"}
    assert records("demonstrations", jsonl(tmp_path / "a.jsonl", rows), columns=columns) == [
        {"prompt": "Q", "completion": "a"}
    ]
    items = read(
        "demonstrations",
        jsonl(tmp_path / "b.jsonl", [{"messages": [user("Q"), assistant("a")]}, {"messages": "Q"}]),
    )
    assert (items[0].record["prompt"], items[0].record["completion"]) == ([user("Q")], [assistant("a")])
    assert faults(items) == [(2, "not-text")]


def test_the_demo_world_is_read_like_a_file() -> None:
    items = stage.read(Source(format="demo", limit=3), seed=0)
    assert [(item.rows[0].source, item.rows[0].line) for item in items] == [
        ("demo", 1),
        ("demo", 2),
        ("demo", 3),
    ]
    assert items == stage.read(Source(format="demo", limit=3), seed=0)


def test_responses_that_repeat_their_prompt_lose_it(tmp_path: Path) -> None:
    whole = [user("Q"), assistant("a")]
    rows = [
        {"prompt": "Q", "chosen": whole, "rejected": [user("Q "), assistant("b")]},
        {"prompt": "Q", "chosen": [{"role": "system", "content": "S"}, *whole], "rejected": whole},
        {"prompt": "P", "chosen": whole, "rejected": whole},
    ]
    items = read("comparisons", jsonl(tmp_path / "a.jsonl", rows))
    assert faults(items) == [(2, "not-a-dialogue"), (3, "not-one-answer")]
    assert (items[0].record["prompt"], items[0].record["rejected"]) == ([user("Q")], [assistant("b")])
    ranked = {"prompt": "Q", "responses": [whole, [user("Q"), assistant("b")]], "ranks": [1, 2]}
    (record,) = records("rankings", jsonl(tmp_path / "b.jsonl", [ranked]))
    assert (record["prompt"], record["responses"]) == ([user("Q")], [[assistant("a")], [assistant("b")]])
    (record,) = records(
        "ratings", jsonl(tmp_path / "c.jsonl", [{"prompt": "Q", "completion": whole, "rating": 1}])
    )
    assert (record["prompt"], record["completion"]) == ([user("Q")], [assistant("a")])


@pytest.mark.parametrize("write", [repr, json.dumps], ids=["python", "json"])
def test_serialized_cells_are_what_they_serialize(tmp_path: Path, write: Any) -> None:
    whole = [[user("Q"), assistant(text)] for text in "ab"]
    rows = {
        "comparisons": {"prompt": "Q", "chosen": write(whole[0]), "rejected": write(whole[1])},
        "dialogues": {"chosen": write(whole[0]), "rejected": write(whole[1])},
        "rankings": {"prompt": "Q", "responses": write(["a", "b"]), "ranks": write([1, 2])},
        "demonstrations": {"messages": write(whole[0])},
        "prompts": {"prompt": write([user("Q")])},
    }
    found = {}
    for format, row in rows.items():
        datasets.Dataset.from_list([row]).to_csv(tmp_path / f"{format}.csv")
        (found[format],) = records(format, tmp_path / f"{format}.csv")
    assert found["comparisons"]["chosen"] == found["dialogues"]["chosen"] == [assistant("a")]
    assert found["comparisons"]["prompt"] == found["dialogues"]["prompt"] == [user("Q")]
    assert (found["rankings"]["responses"], found["rankings"]["ranks"]) == (["a", "b"], [1, 2])
    assert found["demonstrations"]["completion"] == [assistant("a")]
    assert found["prompts"]["prompt"] == [user("Q")]


def test_a_rank_is_one_however_it_is_written(tmp_path: Path) -> None:
    ranks = [1, 1.0, "1", "1.0", 2]
    rows = [{"prompt": "Q", "response": f"a{rank == 2}", "rank": rank} for rank in ranks]
    ranking, *repeated = read("rankings", jsonl(tmp_path / "a.jsonl", rows))
    assert ranking.record == {"prompt": "Q", "responses": ["aFalse", "aTrue"], "ranks": [1, 2]}
    assert faults(repeated) == [(2, "duplicate"), (3, "duplicate"), (4, "duplicate")]


def test_rankings_by_answer_are_grouped_by_what_their_prompts_say(tmp_path: Path) -> None:
    prompts = ["Q", [user("Q")], [{"from": "human", "value": "Q", "id": 1}]]
    rows = [{"prompt": prompt, "response": f"a{n}", "rank": n} for n, prompt in enumerate(prompts, 1)]
    (record,) = records("rankings", jsonl(tmp_path / "a.jsonl", rows))
    assert (record["responses"], record["ranks"]) == (["a1", "a2", "a3"], [1, 2, 3])


def test_a_row_that_is_nested_too_deeply_has_a_reason(tmp_path: Path) -> None:
    path, deep = tmp_path / "a.jsonl", "[" * 900 + "]" * 900
    rows = (
        f'{{"prompt": {deep}, "response": "a", "rank": {deep}}}',
        '{"prompt": "Q", "response": "a", "rank": 1}',
    )
    path.write_text("\n".join(rows), encoding="utf-8")
    items = read("rankings", path)
    assert [item.fault.reason if item.fault else None for item in items if item.rows[0].line == 2] == [None]
    assert sum(len(item.rows) for item in items) == 2


def test_parquet_holds_messages(tmp_path: Path) -> None:
    rows = [{"prompt": [user("Q")], "completion": [assistant("a")]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert records("demonstrations", tmp_path / "a.parquet") == rows


def test_a_mapped_column_is_never_ignored_for_another_shape(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "rude", "label": 1, "question": "Q"}])
    with pytest.raises(UserError, match="format labels needs a column 'completion'"):
        read("labels", path, columns={"prompt": "question"})
