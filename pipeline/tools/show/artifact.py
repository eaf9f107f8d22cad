"""The text of one artifact: what its manifest records."""

from pathlib import Path
from typing import Any

from pipeline.artifacts.files import read_json
from pipeline.artifacts.inputs import artifact_status, inspect_artifact
from pipeline.artifacts.manifest import flatten_keys
from pipeline.artifacts.schema import CRITIC, CRITIC_FILE
from pipeline.errors import UserError, printable

SUMMARY_KEYS = ("kind", "stage", "seed", "created_at", "identity")


def artifact_text(folder: Path, verified: bool) -> str:
    """Return the text for an artifact's folder; `verified` if every file was read again.

    Raises `UserError` if the artifact was altered.
    """
    manifest, problem = inspect_artifact(folder)
    if problem:
        raise UserError(f"{folder}: {problem}; run its stage again")
    checked = "all read again, none altered" if verified else "none altered by size and time"
    summary = {key: manifest[key] for key in SUMMARY_KEYS}
    summary |= {"files": f"{len(manifest['files'])}, {checked}"}
    if "digest" not in manifest:
        summary |= {"digest": "none, as an older version wrote it: the figures below may have been changed"}
    if note := artifact_status(folder)[1]:
        summary |= {"note": note}
    inputs = {
        name: f"{source['path']}  {source.get('revision') or source['identity']}"
        for name, source in manifest["inputs"].items()
    }

    sections: dict[str, dict[str, Any]] = {
        str(folder): summary,
        "inputs": inputs,
        "critic": _describe_critic(folder),
        "rows": manifest["rows"],
        "metrics": manifest["metrics"],
        "versions": manifest["versions"],
    }
    return "\n\n".join(
        f"{title}\n{_table(flatten_keys(section))}" for title, section in sections.items() if section
    )


def _describe_critic(folder: Path) -> dict[str, Any]:
    """Return where the critic of a policy is, and the model or critic that it started from."""
    saved = read_json(folder / CRITIC / CRITIC_FILE)
    source = saved.get("source") or {}
    origin = {"from": f"{source['path']}  {source['identity']}"} if source else {}
    return ({"on": saved.get("on")} | origin) if saved else {}


def _table(entries: dict[str, Any]) -> str:
    width = max(map(len, entries)) + 2
    lines = (
        f"  {name:{width}}{value:.4g}" if isinstance(value, float) else f"  {name:{width}}{value}"
        for name, value in entries.items()
    )
    return "\n".join(printable(line).replace("\n", " ") for line in lines)
