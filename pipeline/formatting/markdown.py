"""Helpers of the model cards: templates, and text that stays text in Markdown and in HTML."""

import json
import re
from pathlib import Path

import jinja2

from pipeline.errors import as_line, printable

# What Markdown, GitHub's tables and links, formulas and HTML read as markup. An underscore inside a word is
# none, nor is a colon but in a URL.
MARKUP = re.compile(r"[\\`*{}\[\]<>!|~&$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.I)


def markdown_environment(folder: Path) -> jinja2.Environment:
    """Build the environment of the Markdown templates in a folder.

    Text goes through one of the filters: `cell` into a table, `span` between backticks, `fence` into a block
    of code, `code` as a literal of Python.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        cell=format_cell, span=format_span, fence=format_fence, code=format_literal, place=format_place
    )
    return environment


def format_place(path: str | Path) -> str:
    """Return a hub id, or a path relative to the working directory.

    Of an absolute path outside the working directory only the name is returned, so that a card does not
    reveal local folders.
    """
    path = Path(path)
    if not path.is_absolute():
        return path.as_posix()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def format_cell(text: str) -> str:
    """Return text as one cell of a Markdown table: it is shown as it is, whatever markup it has."""
    return MARKUP.sub(r"\\\g<0>", as_line(text))


def format_span(text: str) -> str:
    """Return text as code in a line, between more backticks than it has in a row."""
    text = as_line(text)
    ticks = _longer_run(text, 1)
    edge = " " if "`" in text else ""
    return f"{ticks}{edge}{text}{edge}{ticks}"


def format_fence(text: str, language: str) -> str:
    """Return lines as a block of code, between more backticks than they have in a row."""
    ticks = _longer_run(text, 3)
    return f"{ticks}{language}\n{printable(text).rstrip()}\n{ticks}"


def format_literal(value: object) -> str:
    """Return a value as a literal of Python and JSON, in which every character can be seen."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _longer_run(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
