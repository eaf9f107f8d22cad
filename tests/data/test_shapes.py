"""Each published shape, by its sample in docs/data-shapes.md; the records are worked by hand."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import RECIPES, Source
from pipeline.config.prepare import WORLDS, Format
from pipeline.data.columns import FORMATS
from pipeline.data.readers import ParsedRecord, read_source
from pipeline.data.schema import RowError
from pipeline.data.shapes.singles import read_attributes
from pipeline.data.shapes.table import SHAPES, shape_reader
from pipeline.data.validation import validate_records
from tests.data.reading import assistant, jsonl, user

PAGE = (RECIPES.parent / "docs" / "data-shapes.md").read_text(encoding="utf-8")
SAMPLES = dict(re.findall(r"^### `(\w+)`\n.*?```json\n(.*?)```", PAGE, re.M | re.S))


def pair(prompt: Any, chosen: Any, rejected: Any, **optional: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **optional}


def ranking(prompt: Any, *responses: str, ranks: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "responses": [*responses], "ranks": ranks}


def said(*texts: str) -> list[dict[str, str]]:
    """ShareGPT's turns, which begin with the user."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


FRUIT = pair("Name a fruit.", "An apple.", "A carrot.")
COLOUR = pair("Name a colour.", "Blue.", "Seven.")
ANIMAL = pair("Name an animal.", "A fox.", "No.")
CAT = pair("Translate into French.\n\nA cat.", "Un chat.", "Un chien.")
FRUIT_CHAT = pair([user("Name a fruit.")], [assistant("An apple.")], [assistant("A carrot.")])
COLOUR_CHAT = pair([user("Name a colour.")], [assistant("Blue.")], [assistant("Seven.")])

# Shape -> the records of its sample in order, or the reason why a part of a row gives none.
EXPECTED: dict[str, list[Any]] = {
    "alpaca": [
        {"prompt": "Name a fruit.", "completion": "An apple."},
        {"prompt": "Translate into French.\n\nA cat.", "completion": "Un chat."},
        {"prompt": "Name a colour.", "completion": "Blue."},
    ],
    "alpaca_pairs": [FRUIT, CAT, COLOUR],
    "sharegpt": [
        {"prompt": said("Name a fruit."), "completion": said("", "An apple.")[1:]},
        {
            "prompt": [{"from": "system", "value": "Be brief."}, *said("Name a colour.")],
            "completion": said("", "Blue.")[1:],
        },
        {"prompt": said("Hello.", "Hi.", "Name an animal."), "completion": said("", "A fox.")[1:]},
    ],
    "sharegpt_pairs": [
        pair(said(row["prompt"]), said("", row["chosen"])[1:], said("", row["rejected"])[1:])
        for row in (FRUIT, COLOUR, ANIMAL)
    ],
    "kto": [
        {"prompt": said("Name a fruit."), "completion": said("", "An apple.")[1:], "label": True},
        {"prompt": said("Name a fruit."), "completion": said("", "You fool.")[1:], "label": False},
        {"prompt": said("Name a colour."), "completion": said("", "Blue.")[1:], "label": True},
    ],
    "scored": [
        ranking("Name a fruit.", "A carrot.", "An apple.", ranks=[2, 1]),
        ranking("Name a colour.", "Blue.", "Seven.", "Red.", ranks=[1, 2, 1]),
        ranking("Name an animal.", "A fox.", "No.", ranks=[1, 2]),
    ],
    "ultrafeedback": [
        ranking("Name a fruit.", "A carrot.", "An apple.", ranks=[2, 1]),
        ranking("Name a colour.", "Blue.", "Seven.", ranks=[1, 2]),
        ranking("Name an animal.", "A fox.", "No.", "A hen.", ranks=[1, 2, 1]),
    ],
    "ultrafeedback_pairs": [FRUIT_CHAT, "tie", ANIMAL],
    "helpsteer": [
        {"prompt": "Name a fruit.", "completion": "An apple.", "rating": 4},
        {"prompt": "Name a fruit.", "completion": "A carrot.", "rating": 1},
        {"prompt": "Name a colour.", "completion": "Blue.", "rating": 3},
    ],
    "helpsteer2_pairs": [FRUIT | {"margin": 3}, COLOUR | {"margin": 2}, "tie"],
    "helpsteer3": [
        pair([user("Name a fruit.")], "An apple.", "A carrot.", margin=3),
        pair([user("Name a fruit.")], "An apple.", "A carrot.", margin=1),
        pair([user("Name a fruit.")], "A carrot.", "An apple.", margin=1),
        pair([user("Name a colour.")], "Blue.", "Seven.", margin=1),
        "tie",
    ],
    "shp": [
        pair("How do I peel garlic?", "Crush it first.", "No idea."),
        pair("How do I boil rice?", "Two cups of water to one of rice.", "Ask someone."),
        pair("How do I wash wool?", "Cold, by hand.", "Hot."),
    ],
    "nectar": [
        ranking([user("Name a fruit.")], "A carrot.", "An apple.", ranks=[2, 1]),
        ranking([user("Name a colour.")], "Blue.", "Seven.", "Six.", ranks=[1, 3, 2]),
        ranking("Name an animal.", "A fox.", "No.", ranks=[1, 2]),
    ],
    "oasst": [
        ranking([{"role": "prompter", "content": "Name a fruit."}], "A carrot.", "An apple.", ranks=[2, 1]),
        "not-ranked",
    ],
    "pku_saferlhf": [FRUIT, COLOUR, ANIMAL],
    "webgpt": [
        pair("Why is the sky blue?", "Air scatters blue light most.", "It is painted."),
        pair("Why is snow white?", "It scatters all light.", "No idea."),
        "tie",
    ],
    "summaries": [
        pair(
            "I lost my keys, and then found them in the fridge.", "Keys were in the fridge.", "A fridge."
        ),
        pair("My cat sleeps all day and runs all night.", "My cat is awake at night.", "Cats exist."),
        pair("The bridge opened on Monday after two years.", "A bridge opened.", "Monday."),
    ],
    "arena": [FRUIT_CHAT, COLOUR_CHAT, "tie"],
    "pandalm": [FRUIT, FRUIT, "tie", CAT, CAT, CAT, COLOUR, "tie", "tie"],
    "label_studio": [
        FRUIT,
        ranking("Name a colour.", "Blue.", "Seven.", ranks=[1, 2]),
        {"prompt": "Name an animal.", "completion": "A fox.", "rating": 4},
    ],
    "argilla": [
        FRUIT,
        ranking("Name a colour.", "Blue.", "Six.", "Seven.", ranks=[1, 2, 3]),
        {"prompt": "Name an animal.", "completion": "A fox.", "rating": 4},
    ],
}  # fmt: skip


def outcome(item: ParsedRecord) -> Any:
    if item.fault:
        return item.fault.reason
    return "tie" if item.record.get("preference") == 0.5 else item.record


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sample_of_each_shape_is_recognized_and_read(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "sample.jsonl"
    path.write_text(SAMPLES[shape], encoding="utf-8")
    assert len(SAMPLES[shape].splitlines()) == 3
    for source in (Source(path=str(path)), Source(path=str(path), format=shape)):
        assert list(map(outcome, read_source(source))) == EXPECTED[shape]


def test_each_format_has_a_name_in_the_config_and_each_shape_a_row_in_the_docs() -> None:
    assert set(get_args(Format)) == {*WORLDS, *FORMATS, *SHAPES}
    assert set(SAMPLES) == set(SHAPES) == set(EXPECTED)
    table = dict(re.findall(r"^\| \[`(\w+)`\].* \| ([a-z, ]+) \|$", PAGE, re.M))
    assert table == {name: ", ".join(shape.kinds) for name, shape in SHAPES.items()}


# Other columns and values of the published files.


def read_rows(folder: Path, *rows: dict[str, Any], **options: Any) -> list[Any]:
    return list(map(outcome, read_source(Source(path=str(jsonl(folder / "a.jsonl", [*rows])), **options))))


def test_the_arena_of_kaggle_has_lists_of_turns_as_text(tmp_path: Path) -> None:
    votes = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    row = {"prompt": '["Hello.", "Name a fruit."]', "response_a": '["Hi.", "No."]'}
    row |= {"response_b": '["Hi.", "An apple."]', **votes}
    prompt = [user("Hello."), assistant("Hi."), user("Name a fruit.")]
    assert read_rows(tmp_path, row, row | {"winner_tie": 1}) == [
        pair(prompt, [assistant("An apple.")], [assistant("No.")]),
        "no-winner",
    ]


def test_votes_of_a_row_become_one_record(tmp_path: Path) -> None:
    row = {"instruction": "Name a fruit.", "input": "", "response1": "An apple.", "response2": "A carrot."}
    votes = [(1, 1, 0), (1, 2, 2), (1, 2, 0), (0, 0, 0)]
    rows = [
        row | {"instruction": f"Q{n}", "annotator1": a, "annotator2": b, "annotator3": c}
        for n, (a, b, c) in enumerate(votes)
    ]
    source = Source(path=str(jsonl(tmp_path / "a.jsonl", rows)))

    def read(ties: Any) -> dict[str, tuple[str, float]]:
        items = read_source(source)
        validate_records(items, [], ties)
        kept = [item.record for item in items if not item.fault]
        return {record["prompt"]: (record["chosen"], record["preference"]) for record in kept}

    apple, carrot = "An apple.", "A carrot."
    assert read("drop") == {"Q0": (apple, 1.0), "Q1": (carrot, pytest.approx(2 / 3))}
    assert read("keep") == {
        "Q0": (apple, pytest.approx(2.5 / 3)),
        "Q1": (carrot, pytest.approx(2 / 3)),
        "Q2": (apple, 0.5),
        "Q3": (apple, 0.5),
    }


def test_kto_with_columns_of_alpaca_and_of_messages(tmp_path: Path) -> None:
    alpaca = {"instruction": "Add.", "input": "1 + 1", "output": "2", "kto_tag": "true"}
    assert read_rows(tmp_path, alpaca) == [{"prompt": "Add.\n\n1 + 1", "completion": "2", "label": "true"}]
    (record,) = read_rows(tmp_path, {"messages": [user("Q"), assistant("a")], "kto_tag": False})
    assert record == {"prompt": [user("Q")], "completion": [assistant("a")], "label": False}


def test_columns_and_values_of_a_shape_can_be_mapped(tmp_path: Path) -> None:
    sample = {
        "prompt": "Q",
        "response_0": "a",
        "response_1": "b",
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    assert read_rows(tmp_path, sample) == [pair("Q", "a", "b")]
    safer = {"better_response_id": "safer_response_id"}
    assert read_rows(tmp_path, sample, format="pku_saferlhf", columns=safer) == [pair("Q", "b", "a")]
    row = {
        "question": "Q",
        "response_1": "a",
        "response_2": "b",
        "preference_strength": 3,
        "persona": "Be kind.",
    }
    columns = {"prompt": "question", "system": "persona"}
    (record,) = read_rows(tmp_path, row, columns=columns, values={"margin": 0.0})
    assert record == pair([{"role": "system", "content": "Be kind."}, user("Q")], "b", "a", margin=0.0)
    row = {"prompt": "Q", "response": "a", "helpfulness": 1, "correctness": 4}
    (record,) = read_rows(tmp_path, row, format="helpsteer", columns={"helpfulness": "correctness"})
    assert record == {"prompt": "Q", "completion": "a", "rating": 4}
    assert read_attributes(row) == {"helpfulness": 1, "correctness": 4}


def test_a_replied_conversation_of_oasst_is_the_prompt(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"message_id": "1", "parent_id": None, "text": "Hello.", "role": "prompter"},
        {"message_id": "2", "parent_id": "1", "text": "Hi.", "role": "assistant", "rank": 0},
        {"message_id": "3", "parent_id": "2", "text": "Name a fruit.", "role": "prompter"},
        {"message_id": "4", "parent_id": "3", "text": "An apple.", "role": "assistant", "rank": 0},
        {"message_id": "5", "parent_id": "3", "text": "No.", "role": "assistant", "rank": 1},
        {"message_id": "6", "parent_id": "7", "text": "No.", "role": "assistant", "rank": 0},
        {"message_id": "7", "parent_id": "7", "text": "I am my parent.", "role": "assistant", "rank": 0},
    ]
    first, second, *faults = read_rows(tmp_path, *rows)
    assert (first["responses"], first["ranks"]) == (["Hi."], [1])  # one response, which the checks refuse
    assert [turn["content"] for turn in second["prompt"]] == ["Hello.", "Hi.", "Name a fruit."]
    assert (second["responses"], second["ranks"]) == (["An apple.", "No."], [1, 2])
    assert sorted(faults) == ["not-ranked", "not-ranked", "wrong-shape", "wrong-shape"]


LABELLED = {"annotation_id": 1, "annotator": 1, "lead_time": 3.5, "id": 1}


def test_label_studio_as_json_min(tmp_path: Path) -> None:
    texts = {"prompt": "Name a fruit.", "answer1": "A carrot.", "answer2": "An apple."}
    items = [{"id": "x", "body": "A carrot."}, {"id": "y", "body": "An apple."}]
    rows = [
        LABELLED | texts | {"comparison": [{"selected": "right"}]},
        LABELLED | {"prompt": "Name a fruit.", "items": items, "rank": [{"ranker": {"rank": ["y", "x"]}}]},
        LABELLED | {"prompt": "Name a fruit.", "response": "An apple.", "stars": [{"rating": 5}]},
        LABELLED | texts | {"comparison": []},
        LABELLED | texts | {"answer3": "Ice.", "comparison": [{"selected": "right"}]},
        LABELLED | {"prompt": "Q", "items": items, "rank": [{"ranker": {"good": ["y"], "bad": ["x"]}}]},
    ]
    assert read_rows(tmp_path, *rows) == [
        FRUIT,
        ranking("Name a fruit.", "An apple.", "A carrot.", ranks=[1, 2]),
        {"prompt": "Name a fruit.", "completion": "An apple.", "rating": 5},
        "not-judged",
        "wrong-shape",
        "wrong-shape",
    ]


def test_flat_records_of_argilla(tmp_path: Path) -> None:
    def submitted(question: str, *values: Any, statuses: Any = None) -> dict[str, Any]:
        name = f"{question}.responses"
        statuses = statuses or ["submitted"] * len(values)
        return {name: [*values], f"{name}.users": ["u"] * len(values), f"{name}.status": statuses}

    texts = {"id": "1", "_server_id": "s", "prompt": "Name a fruit."}
    two = texts | {"response_1": "A carrot.", "response_2": "An apple."}
    order = [{"value": "response_2", "rank": 1}, {"value": "response_1", "rank": 2}]
    rows = [
        two | submitted("better", "response_2", "response_1", statuses=["submitted", "draft"]),
        two | submitted("order", order),
        two | submitted("better", "tie"),
        two | submitted("why", "It is a fruit."),
        two | submitted("better", "prompt"),
        texts | {"response": "An apple."} | submitted("quality", 4),
        texts | {"response": "An apple."} | submitted("quality", 4) | submitted("tone", 2),
    ]
    rating = {"prompt": "Name a fruit.", "completion": "An apple.", "rating": 4}
    assert read_rows(tmp_path, *rows) == [
        FRUIT,
        ranking("Name a fruit.", "An apple.", "A carrot.", ranks=[1, 2]),
        "tie",
        "not-judged",
        "not-judged",
        rating,
        "wrong-shape",
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "no-winner"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, None]}, "not-a-number"),
        ({"prompt": "Q", "completions": "a", "scores": [1]}, "wrong-shape"),
        ({"prompt": "Q", "answers": ["a", "b"]}, "wrong-shape"),
        ({"instruction": "Q", "completions": [{"response": "a"}]}, "not-a-number"),
        (
            {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
            "no-winner",
        ),
        ({"context": [], "response1": "a", "response2": "b", "overall_preference": 4}, "no-winner"),
        ({"info": {"post": "P"}, "summaries": [{"text": "a"}], "choice": 0}, "wrong-shape"),
        ({"instruction": "Q", "output": "a", "tools": [{"name": "f"}]}, "tool-calls"),
    ],
)
def test_a_row_that_is_not_in_its_shape_has_a_reason(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    assert read_rows(tmp_path, row) == [reason]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["", "a", "[1", "{", "1"]),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "value", "result", "selected", "ranker", "rating", "role", "text", "q"]),
            values,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=40)
@given(data=st.data())
def test_no_row_raises_anything_but_its_reason(shape: str, data: st.DataObject) -> None:
    columns = data.draw(st.sampled_from(SHAPES[shape].columns))
    row = {name: data.draw(JSON) for name in (*columns, *SHAPES[shape].known) if data.draw(st.booleans())}
    read = shape_reader(shape, [row])
    assert read
    try:
        parts = read(row)
    except RowError:
        return
    assert {type(part) for part in parts} in ({dict}, {RowError}, {dict, RowError})


def test_scores_that_are_not_finite_prefer_nothing(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": float("nan"), "score_rejected": 1}
    assert read_rows(tmp_path, pair) == ["not-finite"]
    scored = {"prompt": "p", "completions": ["a", "b"], "scores": [1, float("nan")]}
    assert read_rows(tmp_path, scored) == ["not-finite"]


def test_the_root_of_a_tree_may_be_an_empty_cell(tmp_path: Path) -> None:
    root = {"message_id": "m1", "parent_id": "", "text": "Name a fruit.", "role": "prompter", "rank": ""}
    replies = [
        {"message_id": f"m{n}", "parent_id": "m1", "text": text, "role": "assistant", "rank": str(n - 2)}
        for n, text in ((2, "An apple."), (3, "A carrot."))
    ]
    wrong = replies[0] | {"message_id": "m4", "parent_id": []}
    read = read_rows(tmp_path, root, *replies, wrong)
    assert read[0]["responses"] == ["An apple.", "A carrot."]
    assert sorted(map(str, read[1:])) == ["not-ranked", "wrong-shape"]
