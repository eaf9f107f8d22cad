"""Which labels are one class, what it is called, and which could be one or two."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Source
from pipeline.data.labels import class_names, merged_spellings, parse_label
from pipeline.data.schema import RowError
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("label", "classes", "index"),
    [
        ("yes", ("no", "yes"), 1),
        (" yes ", ("no", "yes"), 1),
        ("YES", ("no", "Yes"), 1),
        (0, ("no", "yes"), 0),
        ("1", ("no", "yes"), 1),
        ("1.0", ("no", "yes"), 1),
        (1.0, ("no", "yes"), 1),
        (True, ("no", "yes"), 1),
        ("False", ("no", "yes"), 0),
        (True, ("true", "false"), 0),
        (1, ("true", "false"), 0),
        (True, ("1", "0"), 0),
        (1, ("yes", "no"), 1),
        (5, ("1", "5"), 1),
        ("5.0", ("1", "5"), 1),
        ("a", ("A", "a"), 1),
        (True, ("nothate", "hate"), 1),
    ],
)
def test_labels_by_name_index_and_bool(label: Any, classes: tuple[str, ...], index: int) -> None:
    assert parse_label(label, list(classes)) == index


@pytest.mark.parametrize(
    "label", ["maybe", 2, -1, 0.5, None, ["no"], {}, pytest.param(10**5000, id="long"), "9" * 5000, "²"]
)
def test_other_labels_are_unknown(label: Any) -> None:
    with pytest.raises(RowError, match="expected one of no, yes; found") as caught:
        parse_label(label, ["no", "yes"])
    assert caught.value.reason == "unknown-label"


@pytest.mark.parametrize("label", [True, "false"])
def test_a_boolean_whose_index_says_the_opposite_is_refused(label: Any) -> None:
    with pytest.raises(RowError, match="or its opposite; write the names"):
        parse_label(label, ["yes", "no"])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([], ["false", "true"]),
        ([True, False], ["false", "true"]),
        (["True"], ["false", "true"]),
        (["toxic", "clean", "toxic", "", None], ["clean", "toxic"]),
        ([10, 9, 1], ["1", "9", "10"]),
        ([1, -1], ["-1", "1"]),
        (["b", 2, "a"], ["2", "a", "b"]),
        (["1.0", "0.0"], ["0.0", "1.0"]),
        ([1.0, 0.0], ["0", "1"]),
        (["true", "false", "unknown"], ["false", "true", "unknown"]),
        # one class in several spellings
        ([True, 0, 1, False], ["false", "true"]),
        (["true", 1, "1.0", "False", 0], ["false", "true"]),
        ([1, "1.0", "2", 2.0], ["1", "2"]),
        (["Yes", "yes", "NO", "yes"], ["NO", "yes"]),
        ([" spam", "Spam", "spam\u200b", "ham"], ["ham", "spam"]),
        (["not  toxic", "Not toxic", "Not toxic", "toxic"], ["Not toxic", "toxic"]),
        (["cafe\u0301", "caf\u00e9", "tea"], ["cafe\u0301", "tea"]),
    ],
)
def test_classes_found(labels: list[Any], classes: list[str]) -> None:
    source = Source(format="labels", path="x")
    assert class_names([source], labels) == classes
    assert class_names([source], labels[::-1]) == classes


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (["yes", "no", 1, 0], "0, no"),
        (["yes", "no", True], "true, yes"),
        (["y", "yes", "n"], "yes, y"),
        ([1, 2, True, False], "false, true, 2"),
        ([-1, 1, "true"], "true, -1"),
        (["clean", "toxic", 0, 1], "clean, toxic, 0, 1"),
    ],
)
def test_labels_that_may_be_one_class_or_two_are_named(labels: list[Any], named: str) -> None:
    with pytest.raises(
        UserError, match=f"^labels: {named} may be one class or several; .*'classes'"
    ) as caught:
        class_names([], labels)
    assert "\n" not in str(caught.value)


def test_the_spellings_of_a_class_are_told() -> None:
    assert merged_spellings([True, 1, 1, False, "a"]) == ["true is '1' 2, 'true' 1"]
    assert merged_spellings([" spam", "Spam", "ham"]) == ["Spam is ' spam' 1, 'Spam' 1"]
    assert merged_spellings([1, 1.0, "1"]) == ["1 is '1' 2, '1.0' 1"]
    assert merged_spellings([1, "1", True, "true"]) == ["true is '1' 2, 'true' 2"]
    assert merged_spellings(["a", "b", 1, None, 10**5000]) == []


def test_classes_given() -> None:
    first, second = (
        Source(format="labels", path="x", classes=classes) for classes in (["b", "a"], ["a", "b"])
    )
    assert class_names([first, first], ["c"]) == ["b", "a"]
    with pytest.raises(UserError, match="sources name different classes"):
        class_names([first, second], [])


LABELS = st.sampled_from(["spam", "Spam ", " ham", "HAM", 7, "7", "7.0", 8.0, "three"])


@given(st.lists(LABELS, max_size=8))
def test_each_label_is_in_the_class_of_its_spellings(labels: list[Any]) -> None:
    classes = class_names([], labels)
    keys = [str(label).strip().lower().removesuffix(".0") for label in labels]
    indices = [parse_label(label, classes) for label in labels]
    for (key, index), (other, other_index) in itertools.product(zip(keys, indices, strict=True), repeat=2):
        assert (key == other) == (index == other_index)


def test_a_missing_label_as_pandas_writes_it_is_no_class() -> None:
    assert class_names([], ["1", "0", "nan", float("nan"), "NaN"]) == ["0", "1"]
