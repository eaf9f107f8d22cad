"""Write configs/schemas/*.json and docs/configuration.md from the config classes and `PPOConfig`."""

from pathlib import Path

from pipeline.tools.reference.keys import format_markdown
from pipeline.tools.reference.schemas import write_schemas

DOCS = Path(__file__).resolve().parent.parent / "docs"

if __name__ == "__main__":
    write_schemas()
    DOCS.mkdir(exist_ok=True)
    (DOCS / "configuration.md").write_text(format_markdown(), encoding="utf-8")
