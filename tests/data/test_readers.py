"""Each format and type of file by hand-made examples, dialogues by a round trip, unreadable sources by their
message.
"""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Source
from pipeline.data.dialogues import TURN, parse_dialogue, parse_turns
from pipeline.data.readers import ParsedRecord, read_source
from pipeline.data.schema import RowError
from pipeline.data.sources import source_files
from pipeline.errors import UserError
from pipeline.prepare import stage


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(format: str, path: Path, **options: Any) -> list[ParsedRecord]:
    return read_source(Source(format=format, path=str(path), **options))


def records(format: str, path: Path, **options: Any) -> list[dict[str, Any]]:
    items = read(format, path, **options)
    assert all(item.fault is None for item in items)
    return [item.record for item in items]


def faults(items: list[ParsedRecord]) -> list[tuple[int, str]]:
    return [(row.line, item.fault.reason) for item in items for row in item.rows if item.fault]


# Formats


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
    assert records("prompts", jsonl(tmp_path / "a.jsonl", rows)) == [{"prompt": "Q"}]


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


# Dialogues


def test_hh_dialogue() -> None:
    head = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"
    assert parse_dialogue(head + " Good.\nVery.", head + " Bad.") == {
        "prompt": [user("Hi"), assistant("Hello."), user("And?")],
        "chosen": [assistant("Good.\nVery.")],
        "rejected": [assistant("Bad.")],
    }


def test_hh_dialogues_that_part_early_have_more_than_one_answer() -> None:
    parted = parse_dialogue(
        "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b", "\n\nHuman: Q\n\nAssistant: c"
    )
    assert parted["prompt"] == [user("Q")]
    assert parted["chosen"] == [assistant("a"), user("R"), assistant("b")]
    assert parted["rejected"] == [assistant("c")]


def test_several_turns_of_one_speaker_become_one() -> None:
    assert parse_turns("\n\nHuman: a\n\nHuman: b\n\nAssistant: c") == [user("a\n\nb"), assistant("c")]


def test_message_lists_share_their_prompt() -> None:
    shared = [user("Q"), assistant("a"), user("R")]
    assert parse_dialogue([*shared, assistant("b")], [*shared, assistant("c")]) == {
        "prompt": shared,
        "chosen": [assistant("b")],
        "rejected": [assistant("c")],
    }
    same = parse_dialogue([*shared, assistant("b")], [*shared, assistant("b")])
    assert (same["prompt"], same["chosen"], same["rejected"]) == (shared, [assistant("b")], [assistant("b")])


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("no speakers", "no speakers", "not-a-dialogue"),
        ("\n\nHuman: Q", "\n\nHuman: Q", "not-a-dialogue"),
        ("Title\n\nHuman: Q\n\nAssistant: a", "Title\n\nHuman: Q\n\nAssistant: b", "not-a-dialogue"),
        (None, "\n\nHuman: Q\n\nAssistant: a", "not-text"),
        ([user("Q")], "\n\nHuman: Q\n\nAssistant: a", "not-text"),
        ([user("Q")], [user("Q")], "not-a-dialogue"),
        ([], [user("Q"), assistant("a")], "not-a-dialogue"),
        ([user("Q"), assistant("a")], [user("R"), assistant("a")], "not-a-dialogue"),
        ([user("Q"), {"role": "narrator", "content": "a"}], [user("Q"), assistant("a")], "not-text"),
        ([user("Q"), assistant("a") | {"tool_calls": [1]}], [user("Q"), assistant("b")], "tool-calls"),
    ],
)
def test_what_is_no_dialogue(chosen: Any, rejected: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_dialogue(chosen, rejected)
    assert caught.value.reason == reason


def test_line_ends_of_windows_part_turns() -> None:
    crlf = "\r\n\r\nHuman: Q\r\nmore\r\n\r\nAssistant: "
    assert parse_dialogue(crlf + "a", crlf + "b") == {
        "prompt": [user("Q\r\nmore")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    mixed = parse_dialogue("\n\nHuman: Q\n\nAssistant: a", "\r\n\r\nHuman: Q\r\n\r\nAssistant: b")
    assert (mixed["prompt"], mixed["chosen"]) == ([user("Q")], [assistant("a")])


def test_messages_are_compared_by_role_and_content() -> None:
    chosen = [user("Q") | {"id": "c"}, assistant("a") | {"weight": 1}, user("R"), assistant("b") | {"id": 1}]
    rejected = [{"from": "human", "value": "Q"}, assistant("a") | {"name": None}, user("R"), assistant("c")]
    found = parse_dialogue(chosen, rejected)
    assert (found["prompt"], found["chosen"], found["rejected"]) == (chosen[:3], chosen[3:], rejected[3:])
    swapped = parse_dialogue([user("Q"), assistant("Q")], [user("Q"), assistant("a")])
    assert (swapped["prompt"], swapped["chosen"]) == ([user("Q")], [assistant("Q")])


def test_dialogues_that_part_early_share_what_is_before_the_first_other_answer() -> None:
    head, tails = [user("Q")], [[assistant(text), user("R"), assistant("b")] for text in "ac"]
    found = parse_dialogue(head + tails[0], head + tails[1])
    assert (found["prompt"], found["chosen"], found["rejected"]) == (head, *tails)
    shorter = parse_dialogue(head + tails[0], head + tails[0][:1])
    assert (shorter["chosen"], shorter["rejected"]) == (tails[0], tails[0][:1])
    by_user = parse_dialogue([*head, *tails[0]], [*head, assistant("a"), user("S"), assistant("b")])
    assert by_user["rejected"] == [assistant("a"), user("S"), assistant("b")]  # both begin with an answer


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


SAID = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and not TURN.search(text))
)


@given(st.lists(SAID, min_size=1).filter(lambda turns: len(turns) % 2 == 1), SAID, SAID)
def test_dialogue_round_trip(history: list[str], chosen: str, rejected: str) -> None:
    messages = [user(text) if n % 2 == 0 else assistant(text) for n, text in enumerate(history)]
    names = {"user": "Human", "assistant": "Assistant"}
    text = (
        "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)
        + "\n\nAssistant: "
    )
    expected = {"prompt": messages, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    assert parse_dialogue(text + chosen, text + rejected) == expected
    assert parse_dialogue([*messages, assistant(chosen)], [*messages, assistant(rejected)]) == expected


# Files


def test_csv_with_bom_crlf_and_newlines_in_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"two\r\nlines, ""quoted""",a\r\n\r\n\xc3\xa9,b\r\n')
    items = read("demonstrations", path)
    assert [item.record for item in items] == [
        {"prompt": 'two\r\nlines, "quoted"', "completion": "a"},
        {"prompt": "é", "completion": "b"},
    ]
    assert [item.rows[0].line for item in items] == [2, 5]


@pytest.mark.parametrize(
    ("text", "line"),
    [('Q,a\nR,"x"y\nS,d\n', 3), ('Q,a\nR,b\nS,"never closed\nT,d\n', 4), ('Q,"a \\" b,\nc"\n', 2)],
)
def test_a_stray_quote_in_csv_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + text, encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"a\.csv:{line}: not valid CSV from here on: .*; close the quotes of each field"
    ):
        read("demonstrations", path)


def test_unreadable_csv_rows_are_quarantined_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\nQ,a\nonly one\nQ,b,c\nS,d\n", encoding="utf-8")
    items = read("demonstrations", path)
    assert faults(items) == [(3, "unreadable-line"), (4, "unreadable-line")]
    assert items[1].fault
    assert items[1].fault.detail == "expected 2 fields, found 1"
    assert [item.record["prompt"] for item in items if not item.fault] == ["Q", "S"]


def test_a_long_csv_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(records("prompts", tmp_path / "a.csv")[0]["prompt"]) == 200_000


def test_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\nQ, and\ta\n", encoding="utf-8")
    assert records("demonstrations", tmp_path / "a.tsv") == [{"prompt": "Q, and", "completion": "a"}]


def test_unreadable_json_lines_are_quarantined_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b"}\n\n{"prompt": \n["Q"]\n{"prompt": "c"}\n', encoding="utf-8")
    items = read("prompts", path)
    assert faults(items) == [(3, "unreadable-line"), (4, "unreadable-line")]
    assert [item.record["prompt"] for item in items if not item.fault] == ["a\u2028b", "c"]
    assert items[1].rows[0].data == '{"prompt": '


def test_json_is_an_array_or_an_object_per_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "Q"}, {"prompt": "R"}, 3]', encoding="utf-8")
    items = read("prompts", tmp_path / "a.json")
    assert [item.record for item in items[:2]] == [{"prompt": "Q"}, {"prompt": "R"}]
    assert faults(items) == [(3, "unreadable-line")]
    (tmp_path / "b.json").write_text('{"prompt": "Q"}\n{"prompt": "R"}\n', encoding="utf-8")
    assert records("prompts", tmp_path / "b.json") == [{"prompt": "Q"}, {"prompt": "R"}]


def test_a_value_that_cannot_be_read_is_a_fault_of_its_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    latin = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": latin}), tmp_path / "a.parquet")
    (item,) = read("prompts", tmp_path / "a.parquet")
    assert item.fault
    assert (item.fault.reason, item.rows[0].data) == ("unreadable-value", {"prompt": None})
    assert item.fault.detail.startswith("prompt: 'utf-8' codec")
    far = pyarrow.array([2**40], type=pyarrow.timestamp("s"))
    datasets.Dataset(pyarrow.table({"prompt": ["Q"], "when": far})).save_to_disk(tmp_path / "far")
    (item,) = read("prompts", tmp_path / "far")
    assert item.fault
    assert (item.fault.reason, item.rows[0].data) == ("unreadable-value", {"prompt": "Q", "when": None})
    assert item.fault.detail.endswith("; drop that column, or save it as text")


def test_a_split_of_a_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q"}')
    with pytest.raises(
        UserError,
        match=r"a\.jsonl: split='test' is only read from a hub dataset, a save_to_disk folder or a folder",
    ):
        read("prompts", tmp_path / "a.jsonl", split="test")


def test_parquet_holds_messages(tmp_path: Path) -> None:
    rows = [{"prompt": [user("Q")], "completion": [assistant("a")]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert records("demonstrations", tmp_path / "a.parquet") == rows


def test_a_folder_is_read_in_order_and_limited(tmp_path: Path) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}1"}, {"prompt": f"{name}2"}])
    (tmp_path / "LICENSE").write_text("MIT", encoding="utf-8")
    (tmp_path / ".hidden.json").write_text("{}", encoding="utf-8")
    items = read("prompts", tmp_path, limit=3)
    assert [(Path(item.rows[0].source).name, item.record["prompt"]) for item in items] == [
        ("a.jsonl", "a1"),
        ("a.jsonl", "a2"),
        ("b.jsonl", "b1"),
    ]


# Datasets

CLASSES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["fine", "rude"])}
)


def test_a_saved_dataset_gives_class_names(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=CLASSES)
    datasets.DatasetDict(train=data.select([0]), test=data).save_to_disk(tmp_path / "dict")
    found = records("labels", tmp_path / "dict", split="test")
    assert [(record["completion"], record["label"]) for record in found] == [
        ("a", "rude"),
        ("b", "fine"),
        ("c", -1),
    ]
    data.save_to_disk(tmp_path / "one")
    assert len(records("labels", tmp_path / "one")) == 3
    assert source_files(Source(format="labels", path=str(tmp_path / "one"))) == [tmp_path / "one"]
    with pytest.raises(
        UserError, match=r"dict: no split 'dev', found train, test; set 'split' of the source"
    ):
        read("labels", tmp_path / "dict", split="dev")


def test_media_of_a_dataset_are_not_decoded(tmp_path: Path) -> None:
    row = {"prompt": "Q", "image": {"bytes": b"no image", "path": None}, "more": {"a": [1, "x"]}}
    types = {"prompt": datasets.Value("string"), "image": datasets.Image(), "more": datasets.Json()}
    columns = {name: [value] for name, value in row.items()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).save_to_disk(tmp_path / "saved")
    (item,) = read("prompts", tmp_path / "saved", ignore=["image"])
    assert item.fault is None
    assert item.rows[0].data == row


def test_a_hub_dataset_is_asked_for_its_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_dict({"prompt": ["Q", "R"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    items = read_source(
        Source(format="prompts", hub="org/name", subset="en", split="test", revision="abc", limit=1)
    )
    assert asked == [(("org/name", "en"), {"split": "test", "revision": "abc"})]
    assert [(item.record, item.rows[0].source, item.rows[0].line) for item in items] == [
        ({"prompt": "Q"}, "org/name", 1)
    ]


def test_a_hub_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/nmae' doesn't exist on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError,
        match=r"^org/nmae: not readable as a dataset: Dataset 'org/nmae' doesn't exist on the Hub; check hub",
    ):
        read_source(Source(format="prompts", hub="org/nmae"))


# What cannot be read at all


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("no.csv", None, {}, r"no\.csv: no such file or folder"),
        ("a.doc", "prompt\nQ\n", {}, r"a\.doc: expected \.csv, .*\.parquet, a folder .* found a\.doc"),
        ("a.json", '[{"prompt": ]', {}, r"a\.json: not valid JSON after row 0: the array does not end"),
        ("a.parquet", "PAR0", {}, r"a\.parquet: not readable as Parquet"),
        (
            "a.csv",
            "promt,b\nQ,R\n",
            {},
            "needs a column 'prompt', found promt, b; use columns: {prompt: promt}",
        ),
        ("a.csv", "a,b\nQ,R\n", {}, "needs a column 'prompt', found a, b; use columns: {prompt: THEIRS}"),
        (
            "a.json",
            '{\n "data": [{"prompt": "Q"}]}',
            {},
            r"a\.json: expected an array of objects, or an object per line; found an object over several",
        ),
        (
            "a.csv",
            "prompt\nQ\n",
            {"promt": "prompt"},
            r"columns maps 'promt', expected one of prompt, answer, system, history; did you mean 'prompt'\?",
        ),
        (
            "a.csv",
            "question\nQ\n",
            {"prompt": "qestion"},
            r"columns maps 'prompt' to 'qestion', found question; did you mean 'question'\?",
        ),
    ],
)
def test_unreadable_sources(
    tmp_path: Path, name: str, content: str | None, options: dict[str, Any], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read("prompts", tmp_path / name, columns=options)
    assert "\n" not in str(caught.value)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        read("prompts", tmp_path)


def test_a_mapped_column_is_never_ignored_for_another_shape(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "rude", "label": 1, "question": "Q"}])
    with pytest.raises(UserError, match="format labels needs a column 'completion'"):
        read("labels", path, columns={"prompt": "question"})


def test_a_list_in_a_cell_that_is_nested_too_deeply_is_a_fault(tmp_path: Path) -> None:
    deep = "[" * 5_000 + "]" * 5_000
    rows = [{"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2]}, {"prompt": "P", "responses": deep}]
    (path := tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, faulty = read("rankings", path)
    assert kept.fault is None
    assert faulty.fault is not None


def test_a_dataset_that_is_cut_is_one_line(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": ["Q" * 1000] * 500}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"saved: not readable as a dataset: .*; save it again"):
        read("prompts", tmp_path / "saved")
