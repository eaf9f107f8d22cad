"""What a manifest says."""

from pathlib import Path
from typing import Any

from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import flatten_keys, read_manifest


def artifact_text(folder: Path, verified: bool) -> str:
    """The text for an artifact's folder. Raises `UserError` where it is altered."""
    manifest = read_manifest(folder)
    require_artifact(folder, manifest["kind"], f"its stage, {manifest['stage']}, again")
    checked = "read again, none altered" if verified else "none altered by size and time"
    sections: dict[str, dict[str, Any]] = {
        str(folder): {key: manifest[key] for key in ("kind", "stage", "seed", "created_at", "identity")}
        | {"files": f"{len(manifest['files'])}, {checked}"},
        "inputs": {
            name: f"{found['path']}  {found.get('revision') or found['identity']}"
            for name, found in manifest["inputs"].items()
        },
        "rows": manifest["rows"],
        "metrics": manifest["metrics"],
        "versions": manifest["versions"],
    }
    return "\n\n".join(
        f"{title}\n{_table(flatten_keys(section))}" for title, section in sections.items() if section
    )


def _table(entries: dict[str, Any]) -> str:
    width = max(map(len, entries)) + 2
    return "\n".join(
        f"  {name:{width}}{value:.4g}" if isinstance(value, float) else f"  {name:{width}}{value}"
        for name, value in entries.items()
    )
