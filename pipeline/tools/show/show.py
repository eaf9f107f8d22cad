"""`rlhf show`: print an artifact, a run, the differences of two of either, or a table of more.

Imports no torch.
"""

from pathlib import Path

from pipeline.artifacts.inputs import artifact_status, inspect_artifact, published_manifest
from pipeline.artifacts.manifest import work_folder
from pipeline.config import STAGES
from pipeline.errors import UserError
from pipeline.tools.show.artifact import artifact_text
from pipeline.tools.show.diff import diff_text
from pipeline.tools.show.run import run_text
from pipeline.tools.show.table import table_text

EXPECTED = "expected a run, such as runs/demo, or a folder that a stage wrote, such as runs/demo/reward"


def show_folders(folders: list[Path], verify: bool, as_table: bool = False) -> str:
    """Return the text for one folder of a run or a stage, for the differences of two, or a table of more.

    A name without a slash is a run in `runs`, if it has one. `as_table` makes a table of one or two also.
    `verify` reads every file of the manifests again. Raises `UserError` if a folder is neither a run nor an
    artifact, if two folders cannot be compared, or if an artifact was altered.
    """
    folders = [_find_folder(folder) for folder in folders]
    artifacts = [find_artifacts(folder) for folder in folders]
    if verify:
        for folder, by_stage in zip(folders, artifacts, strict=True):
            _verify(folder, by_stage)

    if as_table or len(folders) > 2:
        return table_text(folders, artifacts)
    if len(folders) == 2:
        return diff_text(folders[0], folders[1], artifacts[0], artifacts[1])
    is_artifact = folders[0] in artifacts[0].values()
    return artifact_text(folders[0], verify) if is_artifact else run_text(folders[0])


def _find_folder(folder: Path) -> Path:
    in_runs = Path("runs") / folder
    return in_runs if len(folder.parts) == 1 and in_runs.is_dir() else folder


def _verify(folder: Path, by_stage: dict[str, Path]) -> None:
    """Read every file of a run or an artifact again. Raises `UserError` with the first fault."""
    stages = by_stage.values() if folder in by_stage.values() else [folder / stage for stage in STAGES]
    for path in stages:
        if path in by_stage.values():
            problem = inspect_artifact(path, cached=False)[1]
        else:
            status, problem = artifact_status(path)
            problem = problem if status == "altered" else None
        if problem:
            raise UserError(f"{path}: {problem}; run its stage again")


def find_artifacts(folder: Path) -> dict[str, Path]:
    """Return the artifacts of a run's folder by stage, or the one artifact that `folder` is.

    Raises `UserError` if there is neither an artifact nor an unfinished stage, or if `folder` was an artifact
    and has no valid manifest.
    """
    manifest, _ = published_manifest(folder)
    if manifest:
        return {manifest["stage"]: folder}
    status, problem = artifact_status(folder)
    if status == "altered":
        raise UserError(f"{folder}: {problem}; run its stage again")

    artifacts = {stage: folder / stage for stage in STAGES if published_manifest(folder / stage)[0]}
    is_begun = any(
        work_folder(folder / stage).exists() or artifact_status(folder / stage)[0] != "not made"
        for stage in STAGES
        if stage not in artifacts
    )
    if not artifacts and not is_begun:
        problem = "contains nothing that a stage wrote" if folder.exists() else "does not exist"
        raise UserError(f"{folder}: {problem}; {EXPECTED}")
    return artifacts
