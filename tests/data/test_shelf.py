"""A shelf is a list, whatever was written when, and holds copies."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import shelf
from pipeline.data.shelf import Shelf, View, shelve

VALUES = st.lists(st.text(max_size=20) | st.lists(st.integers(), max_size=3), max_size=30)


@given(VALUES, st.lists(st.integers(0, 29), max_size=20), st.integers(1, 60), st.integers(1, 60))
def test_values_are_read_as_they_were_written(
    values: list[Any], places: list[int], write_bytes: int, read_bytes: int
) -> None:
    before = shelf.WRITE_BYTES, shelf.READ_BYTES
    shelf.WRITE_BYTES, shelf.READ_BYTES = write_bytes, read_bytes
    try:
        stored = shelve(values)
        places = [place for place in places if place < len(values)]
        assert list(View(stored.__getitem__, places)) == [values[place] for place in places]
        assert [stored.append(value) for value in values] == list(range(len(values), 2 * len(values)))
        assert list(stored) == values + values
        assert len(stored) == 2 * len(values)
    finally:
        shelf.WRITE_BYTES, shelf.READ_BYTES = before


def test_a_value_is_a_copy() -> None:
    stored = Shelf()
    stored.append([1])
    stored[0].append(2)
    assert stored[0] == [1]
