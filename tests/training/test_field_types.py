"""Values of other types than those of their fields are named; others are left as they are."""

import dataclasses
import math
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional

import numpy
import pytest

from pipeline.training.field_types import check_types


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Arguments:
    count: int = 1
    share: float = 0.5
    limit: Optional[float] = None  # noqa: UP045 - as the libraries write it
    flag: bool = False
    name: str | None = None
    color: Color | str = "red"
    names: list[str] | str = "a"
    options: dict[str, Any] | None = None
    kind: Literal["k1", "k2"] = "k1"
    place: str | Literal[False] | None = None
    anything: Any = None
    fsdp: str | None = None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", "5", "a whole number"),
        ("count", 2.5, "a whole number"),
        ("count", 2.0, "a whole number"),
        ("count", True, "a whole number"),
        ("count", None, "a whole number"),
        ("count", math.nan, "a whole number"),
        ("count", 2**63, "a number of at most 64 bits"),
        ("count", numpy.float64(2.5), "a whole number"),
        ("share", "0.5", "a number"),
        ("share", False, "a number"),
        ("share", 10**400, "a number of at most 64 bits"),
        ("limit", "none", "a number or None"),
        ("limit", [0.5], "a number or None"),
        ("flag", 1, "True or False"),
        ("flag", "yes", "True or False"),
        ("name", 3, "text or None"),
        ("color", 3, "text"),
        ("color", "green", "one of red, blue"),
        ("names", ("a",), "a list or text"),
        ("options", "a", "a dict or None"),
        ("kind", "k3", "k1 or k2"),
        ("place", True, "text or False or None"),
        ("place", 0, "text or False or None"),
    ],
)
def test_a_value_of_another_type_is_named(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected {expected}$") as caught:
        check_types(Arguments(**{name: value}))
    assert len(str(caught.value)) < 160


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("share", 1),
        ("limit", 2.5),
        ("limit", math.inf),  # ranges are not types
        ("count", -(2**63) + 1),
        ("color", Color.BLUE),
        ("color", "blue"),
        ("names", ["a", "b"]),
        ("options", {}),
        ("kind", "k2"),
        ("place", False),
        ("anything", object()),
        ("fsdp", True),
    ],
)
def test_other_values_stay_as_they_are(name: str, value: Any) -> None:
    arguments = Arguments(**{name: value})
    check_types(arguments)
    assert getattr(arguments, name) is value


def test_numbers_of_numpy_and_paths_become_plain() -> None:
    arguments = Arguments(
        count=numpy.int64(3), share=numpy.float32(0.5), flag=numpy.bool_(True), name=Path("a")
    )
    check_types(arguments)
    values = arguments.count, arguments.share, arguments.flag, arguments.name
    assert values == (3, 0.5, True, "a")
    assert list(map(type, values)) == [int, float, bool, str]
