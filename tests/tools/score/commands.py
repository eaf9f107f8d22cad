"""The commands `score` and `best-of-n` as the tests run them, and what they read and leave."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import cli
from pipeline.data.files import READERS

ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a fruit.", "response": "An apple.", "id": 1},
    {"prompt": "", "response": "No prompt at all", "id": 2},
    {"prompt": "Name a fruit.", "response": 'x=y, "quoted"\r\nand\ra line', "id": 3},
    {"prompt": "שלום, מה שלומך?", "response": "مرحبا 👩‍👩‍👧 🎉", "id": 4},
    {"prompt": "Name a colour.", "response": "Blue.", "id": 5},
    {"prompt": "Name a colour.", "response": "Seven.", "id": 6},
    {"prompt": "A long one", "response": "word " * 100_000, "id": 7},
]
PROMPTS = [
    {"prompt": prompt, "id": i}
    for i, prompt in enumerate(["Name a fruit.", "word " * 300, "Why?", "سلام", "Name a colour."])
]
PARTIAL = Path(".out.csv.partial.jsonl")


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[Any]:
    return [row.data for row in READERS[path.suffix](path)]


def main(command: str, model: Path, source: Path, output: str, *more: str) -> int:
    return cli.main([command, "--reward", str(model), "--input", str(source), "--output", output, *more])


def refusal(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line with which a command is refused."""
    assert main(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(*given: Any) -> None:
    raise KeyboardInterrupt
