"""Helpers of the model cards: templates, table cells, and paths without this machine's folders."""

import json
from functools import partial
from pathlib import Path

import jinja2


def markdown_environment(folder: Path) -> jinja2.Environment:
    """Build the environment of the Markdown templates in a folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        cell=format_cell,
        code=partial(json.dumps, ensure_ascii=False),
        place=format_place,
    )
    return environment


def format_place(path: str | Path) -> str:
    """Return a hub id, or a path relative to the working directory.

    Of an absolute path outside the working directory only the name is returned, so that a published card does
    not reveal local folders.
    """
    path = Path(path)
    if not path.is_absolute():
        return path.as_posix()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def format_cell(text: str) -> str:
    """Return text as one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
