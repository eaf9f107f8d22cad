"""What the model cards share: templates, cells, and places told without saying where this machine keeps them."""

import json
from functools import partial
from pathlib import Path

import jinja2


def markdown_environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder, for Markdown."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    found.filters.update(cell=format_cell, code=partial(json.dumps, ensure_ascii=False), place=format_place)
    return found


def format_place(path: str | Path) -> str:
    """A hub id, or a path from the working directory; of one that lies elsewhere the name, since where it lies is nobody's business."""
    path = Path(path)
    if not path.is_absolute():
        return path.as_posix()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def format_cell(text: str) -> str:
    """Text as a Markdown table takes it."""
    return " ".join(text.replace("|", "\\|").split())
