"""`rlhf show`: print an artifact, a run, or the differences of two of either. Imports no torch."""

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
    """Return the text for one folder of a run or a stage, or for the differences of two.

    `verify` reads every file of the manifests again. Raises `UserError` if a folder is neither a run nor an
    artifact, if two folders cannot be compared, or if an artifact was altered.
    """
    artifacts = [find_artifacts(folder) for folder in folders]
    if verify:
        for by_stage in artifacts:
            for folder in by_stage.values():
                verify_artifact(Artifact(folder, read_manifest(folder)))

    if len(folders) == 2:
        return diff_text(folders[0], folders[1], artifacts[0], artifacts[1])
    is_artifact = folders[0] in artifacts[0].values()
    return artifact_text(folders[0], verify) if is_artifact else run_text(folders[0])


def find_artifacts(folder: Path) -> dict[str, Path]:
    """Return the artifacts of a run's folder by stage, or the one artifact that `folder` is.

    Raises `UserError` if there is neither an artifact nor an unfinished stage.
    """
    if manifest := read_manifest(folder):
        return {manifest["stage"]: folder}

    artifacts = {stage: folder / stage for stage in STAGES if read_manifest(folder / stage)}
    if not artifacts and not any(work_folder(folder / stage).exists() for stage in STAGES):
        problem = "contains nothing that a stage wrote" if folder.exists() else "does not exist"
        raise UserError(f"{folder}: {problem}; {EXPECTED}")
    return artifacts
