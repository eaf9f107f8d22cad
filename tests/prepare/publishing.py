"""The stage run on small files, and what it published."""

import json
from pathlib import Path
from typing import Any

from datasets import load_from_disk

from pipeline.config import PrepareStage
from pipeline.prepare.stage import run

Q = [{"role": "user", "content": "Q"}]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepare(folder: Path, *sources: dict[str, Any], **options: Any) -> Path:
    return run(PrepareStage(run="test", runs=str(folder / "runs"), source=list(sources), **options))


def manifest(published: Path) -> dict[str, Any]:
    return json.loads((published / "manifest.json").read_text(encoding="utf-8"))


def quarantined(published: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (published / "quarantine.jsonl").open(encoding="utf-8")]


def rows_of(published: Path, kind: str) -> list[Any]:
    """The rows of all splits."""
    return [row for split in load_from_disk(str(published / kind)).values() for row in split]


def kinds(published: Path) -> list[str]:
    return sorted(path.name for path in published.iterdir() if path.is_dir())


def pairs(*prompts: str, chosen: str = "a") -> list[Any]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": "b"} for prompt in prompts]


def prompts_by_split(published: Path, kind: str) -> dict[str, list[str]]:
    return {split: sorted(part["prompt"]) for split, part in load_from_disk(str(published / kind)).items()}
