"""What a manifest says, for a person."""

from pathlib import Path
from typing import Any

from pipeline import artifact
from pipeline.errors import UserError


def show(folder: Path, verify: bool) -> str:
    """The text for an artifact's folder; `verify` reads every vouched file again. Raises `UserError` where it is none, or is altered."""
    manifest = artifact.read_manifest(folder)
    if not manifest:
        stages = ", ".join(str(found.parent) for found in sorted(folder.glob("*/manifest.json")))
        found = f"is a run; name one of {stages}" if stages else "holds no manifest.json of ours" if folder.exists() else "does not exist"
        raise UserError(f"{folder}: {found}; expected a folder that a stage wrote, such as runs/demo/reward")
    opened = artifact.require(folder, manifest["kind"], f"its stage, {manifest['stage']}, again")
    if verify:
        artifact.verify(opened)
    checked = "read again, none altered" if verify else "none altered by size and time"
    sections: dict[str, dict[str, Any]] = {
        str(folder): {key: manifest[key] for key in ("kind", "stage", "seed", "created_at", "identity")}
        | {"files": f"{len(manifest['files'])}, {checked}"},
        "inputs": {name: f"{found['path']}  {found.get('revision') or found['identity']}" for name, found in manifest["inputs"].items()},
        "rows": manifest["rows"],
        "metrics": manifest["metrics"],
        "versions": manifest["versions"],
    }
    return "\n\n".join(f"{title}\n{_table(artifact.flatten(section))}" for title, section in sections.items() if section)


def _table(entries: dict[str, Any]) -> str:
    width = max(map(len, entries)) + 2
    return "\n".join(
        f"  {name:{width}}{value:.4g}" if isinstance(value, float) else f"  {name:{width}}{value}" for name, value in entries.items()
    )
