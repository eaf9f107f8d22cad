"""Text in a card is shown as it is: a Markdown renderer finds no markup in it, and no HTML."""

import ast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline.errors import as_line
from pipeline.formatting.markdown import format_cell, format_fence, format_literal, format_span

RENDERER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MARKUP = [
    *("<script>alert(1)</script>", "![](http://evil/x.png)", "[x](javascript:alert(1))", "<!--", "&lt;b&gt;"),
    *("a | b", "`code`", "``", "**bold**", "_it_", "~~gone~~", "---", "# head", "- item", "1. one", "[^1]"),
    *("http://evil.example", "www.evil.example", "me@evil.example", "$x$", "\\", "\\|", "<https://evil>"),
    *("![a]: b", "\u202egnp.exe", "\x1b[31mred", "a\nb", "\r", "::: x", "{{ x }}", "{% x %}", "$$", "<"),
]
TEXT = st.lists(st.sampled_from(MARKUP) | st.text(max_size=5), max_size=6).map("".join)


def inline(markdown):
    """The tokens of the inline content."""
    return [token for block in RENDERER.parse(markdown) for token in block.children or []]


@given(TEXT, TEXT)
def test_a_cell_is_one_cell_of_plain_text(first, second):
    table = f"| a | b |\n|---|---|\n| {format_cell(first)} | {format_cell(second)} |\n"
    cells = [token for token in RENDERER.parse(table) if token.type == "inline"]
    assert len(cells) == 4
    for cell, text in zip(cells[2:], (first, second), strict=True):
        assert {token.type for token in cell.children} <= {"text", "text_special"}
        assert "".join(token.content for token in cell.children) == as_line(text).strip()


@given(TEXT)
def test_a_span_is_code_and_nothing_else(text):
    line = as_line(text)
    if line.strip("` "):
        tokens = inline(f"before {format_span(text)} after")
        assert [token.type for token in tokens] == ["text", "code_inline", "text"]
        assert tokens[1].content.strip() == line.strip()


@given(st.dictionaries(TEXT, TEXT), TEXT)
def test_a_fence_holds_all_its_lines(settings, text):
    for content in (yaml.safe_dump(settings), text):
        block, *rest = RENDERER.parse(format_fence(content, "yaml") + "\n\nafter\n")
        assert block.type == "fence"
        assert [token.type for token in rest] == ["paragraph_open", "inline", "paragraph_close"]


@given(st.text() | st.sampled_from(MARKUP))
def test_a_literal_is_read_back_and_every_character_is_seen(text):
    literal = format_literal(text)
    assert literal.isprintable()
    assert ast.literal_eval(literal).encode("utf-16", "surrogatepass") == text.encode(
        "utf-16", "surrogatepass"
    )


@pytest.mark.parametrize(("value", "literal"), [(["a", "é"], '["a", "é"]'), ("a\u202e", r'"a\u202e"')])
def test_what_can_be_seen_is_not_escaped(value, literal):
    assert format_literal(value) == literal


def test_usual_text_stays_readable():
    assert format_cell("a | b\nc") == "a \\| b c"
    for usual in ("accuracy of “longer wins”", "0.812 to 0.901", "gold_reward", "by 95 % (n = 6)", "k: 1.5"):
        assert format_cell(usual) == usual
