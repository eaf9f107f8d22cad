"""`rlhf init`: write a recipe of one's own, as a copy of another. Imports no torch."""

import os
import re
from pathlib import Path

from pipeline.config import RECIPES, STAGES, find_recipe, find_stage_file, recipes
from pipeline.config.recipes import BASE
from pipeline.errors import UserError

RUN_NAME = re.compile(r"\w[\w.-]*")  # as the key `run` has it, which defaults to the recipe's name
# The first line of a config names its schema, by a path from the file.
SCHEMA = re.compile(r"^(# yaml-language-server: \$schema=)\S*/(schemas/\w+\.json)")


def write_recipe(folder: Path, source: str) -> list[str]:
    """Copy the recipe `source`, a name or a path, to a new folder; return the names of the stages' files.

    The copy has every stage's file, also those that the recipe takes from another, and all data files.
    Raises `UserError` if the folder exists, its name cannot be a run's, or there is no such recipe.
    """
    name = folder.resolve().name
    if name in recipes():
        raise UserError(
            f"init {folder}: is the name of a shipped recipe, which it would hide; choose another"
        )
    if not RUN_NAME.fullmatch(name):
        raise UserError(
            f"init {folder}: {name!r} cannot be the name of a run; expected letters, digits, _, . and -"
        )
    if os.path.lexists(folder):
        raise UserError(f"init {folder}: exists already; choose another name, or remove it first")

    recipe = find_recipe(source, "--from")
    files = {path.relative_to(recipe): path for path in recipe.rglob("*") if path.is_file()}
    files.pop(Path(BASE), None)
    stages = {Path(f"{stage}.yaml"): find_stage_file(recipe / f"{stage}.yaml") for stage in STAGES}
    stages = {place: path for place, path in stages.items() if path.exists()}
    for place, path in (files | stages).items():
        _copy_file(path, folder / place)
    return list(map(str, stages))


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file; a config names its schema by the path from its new place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    if source.suffix == ".yaml":
        schemas = os.path.relpath(RECIPES, target.parent)
        text = content.decode("utf-8", "surrogateescape")
        content = SCHEMA.sub(rf"\g<1>{schemas}/\g<2>", text).encode("utf-8", "surrogateescape")
    target.write_bytes(content)
