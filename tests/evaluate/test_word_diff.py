"""Words that only one of two texts has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate import report
from pipeline.evaluate.report import word_diff


def test_long_texts_are_compared_in_linear_time():
    """Word by word, each of these would take hours."""
    many = 200_000
    for parts, text in zip(word_diff("a x " * many, "a " * many), ("a x " * many, "a " * many), strict=True):
        assert [changed for _, changed in parts[:2]] == [False, False]
        assert "".join(part for part, _ in parts) == text
    same = " ".join(map(str, range(many)))
    before, after = word_diff(f"{same} b c {same}", f"{same} d {same}")
    assert [part for part, changed in before if changed] == ["b c"]
    assert [part for part, changed in after if changed] == ["d"]


def test_texts_with_many_equal_words_are_marked_as_a_whole():
    before, after = word_diff("a " + "x y " * 150 + "q z", "a " + "y " * 300 + "r z")
    assert [part for part, changed in before if changed] == ["x y " * 150 + "q"]
    assert [part for part, changed in after if changed] == ["y " * 300 + "r"]


@given(st.text("ab \n\t", max_size=60), st.text("ab \n\t", max_size=60), st.integers(0, 5))
def test_the_parts_of_a_text_are_the_text(a, b, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "MAX_DIFF_WORDS", limit)
        for text, parts in zip((a, b), word_diff(a, b), strict=True):
            assert "".join(part for part, _ in parts) == text
            assert not any(changed and part[0].isspace() for part, changed in parts)
    unchanged = [" ".join(p for p, changed in parts if not changed).split() for parts in word_diff(a, b)]
    assert unchanged[0] == unchanged[1]
