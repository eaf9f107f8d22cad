"""Numbers as tables show them."""

import math

from pipeline.formatting.numbers import format_number

NAN = float("nan")


def test_numbers() -> None:
    values = {
        "–": None,
        "True": True,
        "12,480": 12480,
        "0.1235": 0.123456,
        "0": -0.0,
        "inf": math.inf,
        "a": "a",
        '[1, "é"]': [1, "é"],
    }
    assert [format_number(value) for value in values.values()] == list(values)
    assert format_number(NAN) == "–"
    assert format_number(-0.001, "z.2f") == "0.00"
