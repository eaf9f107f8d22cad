"""An override sets one key, or is refused in one line that says how it is written."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config
from pipeline.config.overrides import apply_overrides
from pipeline.errors import UserError


def apply(values: dict[str, Any], *overrides: str) -> dict[str, Any]:
    apply_overrides(values, overrides)
    return values


def refused(values: dict[str, Any], override: str) -> str:
    with pytest.raises(UserError) as error:
        apply(values, override)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "override", "expected"),
    [
        ({}, "a=1e-4", {"a": 1e-4}),
        ({}, "a.b.c=[1, x]", {"a": {"b": {"c": [1, "x"]}}}),
        ({"a": None}, "a.b=", {"a": {"b": None}}),
        ({"a": {"b": 1, "c": 2}}, "a.b=x=y", {"a": {"b": "x=y", "c": 2}}),
        ({"a": {"b": 1, "c": 2}}, "a={d: 3}", {"a": {"d": 3}}),
        ({"a": [{"b": 1}]}, "a.b=2", {"a": [{"b": 2}]}),
        ({"a": [{"b": 1}]}, "a.0.b=2", {"a": [{"b": 2}]}),
        ({"a": [{"b": 1}]}, "a[0].b=2", {"a": [{"b": 2}]}),
        ({"a": {"b": 1}}, "a.0.b=2", {"a": {"b": 2}}),
        ({"a": [{"b": 1}, {}]}, "a.1.b=2", {"a": [{"b": 1}, {"b": 2}]}),
        ({"a": ["x", "y"]}, "a.1=z", {"a": ["x", "z"]}),
        ({}, "a=2020-01-01", {"a": "2020-01-01"}),
        ({}, "a=${run}/x", {"a": "${run}/x"}),
    ],
)
def test_an_override_sets_one_key(values: dict[str, Any], override: str, expected: dict[str, Any]) -> None:
    assert apply(values, override) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("", "override '': expected key=value, such as training.learning_rate=1e-4"),
        ("=1", "override '=1': expected key=value"),
        ("s", "override 's': expected key=value"),
        ("a..b=1", "'a..b' is no key; expected names with dots between them"),
        ("[=1", "'[' is no key"),
        ("\udcff=1", r"'\udcff' is no key"),
        ("a." * 40 + "a=1", "its key has 41 parts; expected at most 16"),
        ("two.path=x", "override 'two.path=x': two is a list of 2; name one of them: two.0.path=…"),
        ("two.2.path=x", "two has no item 2: expected 0 to 1"),
        ("two.-1.path=x", "two has no item -1: expected 0 to 1"),
        ("two.99999999999999999999.a=x", "two has no item 99999999999999999999: expected 0 to 1"),
        ("none.0=x", "none has no item 0: it is empty"),
        ("s.b=1", "s is 'text', not a section with keys"),
        ("s[0]=1", "s is 'text', not a section with keys"),
        ("names.b=1", "names is 'x', not a section with keys"),
        ("a=[", "its value is not readable as YAML: "),
        ("a={b: 1, b: 2}", "found duplicate key b"),
        ("a=&a [*a]", "recursive aliases are not supported"),
        ("a=!!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("a=" + "[" * 100_000 + "]" * 100_000, "more than 16 sections or lists inside each other"),
        ("a=" + "9" * 5000, "Exceeds the limit"),
        ("a=\udcff", "unacceptable character #xdcff"),
    ],
)
def test_any_other_override_is_one_line(override: str, expected: str) -> None:
    values = {"two": [{}, {}], "none": [], "s": "text", "names": ["x"]}
    message = refused(values, override)
    assert expected in message
    assert len(message) < 500


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_is_an_override_or_one_line(key: str, value: str) -> None:
    message = ""
    try:
        apply({"a": [{"b": {}}], "b": "c"}, f"{key}={value}")
    except UserError as error:
        message = str(error)
    assert not message or re.fullmatch(r"override .*: .*", message)


def test_the_source_of_each_named_recipe_is_overridden(tmp_path: Any) -> None:
    several = config.RECIPES / "toxicity" / "prepare.yaml"
    loaded = config.load("prepare", several, ["source.1.path=other.csv"])
    assert [source.path for source in loaded.source][1] == "other.csv"
    with pytest.raises(UserError, match=r"source is a list of 2; name one of them: source\.0\.path=…"):
        config.load("prepare", several, ["source.path=other.csv"])
    for key in ("source.path", "source.0.path"):
        loaded = config.load("prepare", config.RECIPES / "gpt2-ranked" / "prepare.yaml", [f"{key}=other.csv"])
        assert loaded.source[0].path == "other.csv"
