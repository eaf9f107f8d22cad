"""What is printed of strangers' text can neither move the cursor nor hide or reorder anything."""

import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.quiet import PrintableFormatter
from pipeline.errors import UserError, as_line, one_line, printable
from pipeline.formatting.tables import align_columns
from pipeline.tools.score.commands import _fit_to_width

ESCAPES = {
    "\x1b[31mred\x1b[0m": "red",
    "\x1b[2J\x1b[1;1Hhome": "home",
    "\x9b31mred": "red",
    "\x1b]0;title\x07after": "after",
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\": "link",
    "\x1b]0;without end": "0;without end",
    "\x1bPq#0\x1b\\after": "after",
    "\x1bcreset": "reset",
    "\x1b(Bset": "set",
    "\x1b": "",
    "\x1b[": "",
    "over\rwritten": "over written",
    "bell\x07": "bell",
    "back\x08\x08": "back",
    "nul\x00": "nul",
    "\u202egnp.exe": "gnp.exe",
    "\u2066a\u2069": "a",
    "two\u2028lines\x85three": "two lines three",
    "half\ud800": "half\ufffd",
    "family \U0001f468\u200d\U0001f469 é ∑": "family \U0001f468\u200d\U0001f469 é ∑",
}


@pytest.mark.parametrize(("text", "shown"), ESCAPES.items())
def test_a_message_has_no_escapes(text, shown):
    assert as_line(text) == shown
    assert one_line(UserError(text)) == shown or shown == ""
    assert UserError(text)._render_traceback_() == [f"error: {shown or 'UserError'}"]
    assert PrintableFormatter().format(logging.makeLogRecord({"msg": text})) == shown


@given(st.text(st.sampled_from("\x1b[]0;mPX\\\x07\x9b\r\n\ta\u202e\ud800 ")) | st.text())
def test_nothing_but_text_and_line_feeds_is_left(text):
    shown = printable(text)
    assert {unicodedata.category(c) for c in shown if c not in "\n\t"} & {"Cc", "Cs", "Zl", "Zp"} == set()
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
    assert printable(shown) == shown
    assert as_line(text) == as_line(as_line(text))
    shown.encode()


def test_lines_and_tabs_of_a_table_stay():
    assert printable("a\tb\n  c\r\n") == "a\tb\n  c\n"


def test_many_open_escapes_are_read_once():
    """Each of these would be searched to the end of the text for an end that never comes."""
    assert printable("\x1b]" * 200_000) == ""
    assert printable("\x1b[" * 200_000) == ""
    assert printable("\x1b" + " " * 200_000 + "\x1b") == ""


def test_tables_are_aligned_by_what_is_shown():
    rows = [["a", "1"], ["\x1b[31mb\x1b[0m", "\u202e2"], ["c\nd", "3"]]
    assert align_columns(rows).splitlines() == ["a    1", "b    2", "c d  3"]
    assert _fit_to_width("\x1b[31mred\x1b[0m", 3) == "red"
