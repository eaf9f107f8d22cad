"""What was made, for a person: an artifact, a run, or what differs between two of either. Imports no torch."""

from pathlib import Path

from pipeline.artifacts.inputs import verify_artifact
from pipeline.artifacts.manifest import Artifact, read_manifest, work_folder
from pipeline.config import STAGES
from pipeline.errors import UserError
from pipeline.tools.show.artifact import artifact_text
from pipeline.tools.show.diff import diff_text
from pipeline.tools.show.run import run_text

EXPECTED = "expected a run, such as runs/demo, or a folder that a stage wrote, such as runs/demo/reward"


def show_folders(folders: list[Path], verify: bool) -> str:
    """The text for a run's or a stage's folder, or for two; `verify` reads every vouched file again. Raises `UserError` where a folder is
    neither, or one is altered."""
    opened = [find_stages(folder) for folder in folders]
    for found in opened if verify else []:
        for folder in found.values():
            verify_artifact(Artifact(folder, read_manifest(folder)))
    if len(folders) == 2:
        return diff_text(folders[0], folders[1], opened[0], opened[1])
    return artifact_text(folders[0], verify) if folders[0] in opened[0].values() else run_text(folders[0])


def find_stages(folder: Path) -> dict[str, Path]:
    """The artifacts in a run's folder by their stage, or the one that the folder is."""
    if manifest := read_manifest(folder):
        return {manifest["stage"]: folder}
    found = {stage: folder / stage for stage in STAGES if read_manifest(folder / stage)}
    if not found and not any(work_folder(folder / stage).exists() for stage in STAGES):
        raise UserError(
            f"{folder}: {'holds nothing that a stage wrote' if folder.exists() else 'does not exist'}; {EXPECTED}"
        )
    return found
