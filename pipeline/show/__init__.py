"""What was made, for a person: an artifact, a run, or what differs between two of either. Imports no torch."""

from pathlib import Path

from pipeline import artifact
from pipeline.config import STAGES
from pipeline.errors import UserError
from pipeline.show.difference import difference
from pipeline.show.one import one
from pipeline.show.run import run

EXPECTED = "expected a run, such as runs/demo, or a folder that a stage wrote, such as runs/demo/reward"


def show(folders: list[Path], verify: bool) -> str:
    """The text for a run's or a stage's folder, or for two; `verify` reads every vouched file again. Raises `UserError` where a folder is
    neither, or one is altered."""
    opened = [stages(folder) for folder in folders]
    for found in opened if verify else []:
        for folder in found.values():
            artifact.verify(artifact.Artifact(folder, artifact.read_manifest(folder)))
    if len(folders) == 2:
        return difference(folders[0], folders[1], opened[0], opened[1])
    return one(folders[0], verify) if folders[0] in opened[0].values() else run(folders[0])


def stages(folder: Path) -> dict[str, Path]:
    """The artifacts in a run's folder by their stage, or the one that the folder is."""
    if manifest := artifact.read_manifest(folder):
        return {manifest["stage"]: folder}
    found = {stage: folder / stage for stage in STAGES if artifact.read_manifest(folder / stage)}
    if not found and not any(artifact.work_folder(folder / stage).exists() for stage in STAGES):
        raise UserError(f"{folder}: {'holds nothing that a stage wrote' if folder.exists() else 'does not exist'}; {EXPECTED}")
    return found
