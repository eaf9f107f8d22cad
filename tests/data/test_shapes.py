"""Each published shape, by its sample in docs/data-shapes.md; the records are worked by hand."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline.config import RECIPES, Source
from pipeline.config.prepare import WORLDS, Format
from pipeline.data.readers import FORMATS, ParsedRecord, read_source
from pipeline.data.shapes.table import SHAPES
from tests.data.reading import assistant, user

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
        pair([user("Name a fruit.")], "An apple.", "A carrot.", margin=2),
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
    return item.fault.reason if item.fault else item.record


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
