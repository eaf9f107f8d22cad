"""A config is plain data that may be published."""

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline import config
from pipeline.config.parsing import parse_text, resolve
from pipeline.config.values import check_values
from pipeline.errors import UserError

TOKEN = "hf_" + "a1B2" * 9


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (math.nan, "found nan; expected a finite number"),
        (-math.inf, "found -inf; expected a finite number"),
        (2**63, "found an integer of more than 64 bits"),
        (b"x", "found a bytes; expected text"),
        (Path("x"), "found a PosixPath; expected text"),
        (datetime.date(2020, 1, 1), "found a date; expected text"),
        ("a\0b", "not valid Unicode text"),
        ("\ud800", "not valid Unicode text"),
        ("http://me:secret@host/x", "contains a password or token"),
        ("http://:secret@host", "contains a password or token"),
        ("https://host/x?access_token=secret", "contains a password or token"),
        (TOKEN, "contains a password or token"),
        (f"https://host/{TOKEN}", "contains a password or token"),
    ],
)
def test_what_no_key_can_have_is_refused_by_its_place(value: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=r"^training\.kwargs\.0\.x: ") as error:
        check_values({"training": {"kwargs": [{"x": value}]}})
    assert problem in str(error.value)
    assert "secret" not in str(error.value)
    assert TOKEN not in str(error.value)
    with pytest.raises(ValidationError, match=r"training\.a: "):
        config.SFTStage(run="r", model="m", training={"a": value})


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1.5, 2**63 - 1, "", "a@b.c", "http://host:80/x@y", "hf_model", "meta/sk-1", "\n"],
)
def test_plain_data_is_accepted(value: Any) -> None:
    check_values({"a": [value], value if isinstance(value, str) else "b": {}})


@pytest.mark.parametrize("key", [5, True, None, 1.5])
def test_keys_are_text(key: Any) -> None:
    with pytest.raises(ValueError, match="expected text as a key"):
        check_values({"a": {key: 1}})


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:TOKEN}",
        "${oc.env:TOKEN,none}",
        "x/${oc.env:TOKEN}",
        "${oc.${name}:TOKEN}",
        "${${name}.env:TOKEN}",
        "\\${oc.env:TOKEN}",
        "${oc.decode:${oc.env:TOKEN}}",
        "${oc.create:[1]}",
        "${oc.select:name}",
        "${ oc.env : TOKEN }",
    ],
)
def test_the_environment_is_never_read(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKEN", "secret-value")
    with pytest.raises(ValueError, match="the environment is not, because a config is published") as error:
        resolve({"name": "oc", "a": [{"b": text}]})
    assert "secret-value" not in str(error.value)
    file = tmp_path / "sft.yaml"
    file.write_text("model: a\n")
    with pytest.raises(UserError) as refused:
        config.load("sft", file, [f"model='{text}'"])
    assert "secret-value" not in str(refused.value)


def test_a_key_has_the_value_of_another() -> None:
    values = parse_text(
        "run: x\nn: 3\nlist: [a, {b: '${run}-${n}'}]\nsame: ${n}\nin: ${list.1.b}\nname: run\n"
    )
    values["nested"] = "${${name}}"
    assert resolve(values) == {
        "run": "x",
        "n": 3,
        "list": ["a", {"b": "x-3"}],
        "same": 3,
        "in": "x-3",
        "name": "run",
        "nested": "x",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: ${b}\nb: ${a}", "Recursive interpolation"),
        ("a: ${nope}", "Interpolation key 'nope' not found, key a"),
        ("a: ${a.b}", "a"),
    ],
)
def test_a_key_that_has_no_value_is_one_line(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        resolve(parse_text(text))
    assert "\n" not in str(error.value)


def test_a_file_of_aliases_of_aliases_is_refused() -> None:
    lines = [
        "a: &a [x]",
        *(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]"
            for old, new in zip("abcdefg", "bcdefgh", strict=True)
        ),
    ]
    with pytest.raises(ValueError, match="node expansion exceeds"):
        parse_text("\n".join(lines))
