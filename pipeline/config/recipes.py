"""Recipes: find the folder of one, and the file of each stage, with the files that it extends.

A recipe is a folder with a YAML file per stage. It needs only the stages that it changes: `recipe.yaml` names
under its one key, `extends`, the recipe that has the other files.
"""

import os
from pathlib import Path
from typing import Any

from pipeline.config.parsing import parse_text
from pipeline.config.values import map_text, nearest, shorten
from pipeline.errors import UserError, one_line

MAX_CHARACTERS = 2**20  # of a config file
PACKAGE = Path(__file__).resolve().parent.parent
IN_WHEEL, IN_CHECKOUT = PACKAGE / "configs", PACKAGE.parent / "configs"
RECIPES = IN_WHEEL if IN_WHEEL.is_dir() else IN_CHECKOUT
BASE = "recipe.yaml"  # names the recipe that has the files which a recipe does not have


def recipes() -> list[str]:
    """Return the names of the shipped recipes that have every stage."""
    return [
        name
        for name in _shipped()
        if any((RECIPES / name / file).exists() for file in ("prepare.yaml", BASE))
    ]


def find_recipe(name: str, option: str = "--recipe") -> Path:
    """Return the folder of a recipe: a path, or the name of a shipped one. Raises `UserError`.

    A folder of that name without YAML files does not hide a shipped recipe. `option` begins the message.
    """
    folder = Path(name)
    if name in _shipped() and not any(folder.glob("*.yaml")):
        return RECIPES / name
    if name and folder.is_dir():
        return folder
    raise UserError(
        f"{option} {name}: no such recipe{nearest(name, recipes())}; there are: {', '.join(recipes())}"
    )


def find_stage_file(path: Path) -> Path:
    """Return `path` if it exists, else the file of this name in the recipe that its recipe.yaml extends.

    Without a recipe.yaml that is `path` too. Raises `UserError` if a recipe.yaml is wrong.
    """
    passed: list[Path] = []
    while not path.exists() and (path.parent / BASE).exists():
        base = path.parent / BASE
        values = _read_mapping(base)
        if set(values) != {"extends"}:
            raise UserError(
                f"{base}: expected one key, such as extends: demo, found {', '.join(values) or 'none'}"
            )
        file = _extended_file(path, values["extends"], base)
        if file.parent.resolve() in passed:
            raise UserError(f"{base}: extends itself, by way of {values['extends']}")
        passed.append(path.parent.resolve())
        path = file
    return path


def read_stage_file(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a stage's file, merged over the one that its key `extends` names. Raises `UserError`.

    `extends` is the path of a file or of a recipe's folder, or the name of a shipped recipe. In any text,
    `${recipe}` becomes the file's folder, and `${recipes}` the folder of the shipped recipes.
    """
    path = find_stage_file(path)
    if path.resolve() in extending:
        raise UserError(f"{path}: extends itself, by way of {' and '.join(map(str, extending))}")
    values = _read_mapping(path)
    folder, shipped = os.path.relpath(path.parent), os.path.relpath(RECIPES)
    values = map_text(lambda text: text.replace("${recipe}", folder).replace("${recipes}", shipped), values)
    extended = values.pop("extends", None)
    if extended is None:
        return values
    file = _extended_file(path, extended, path)
    return _merge(read_stage_file(file, (*extending, path.resolve())), values)


def _shipped() -> list[str]:
    """Return the names of all shipped recipes, also of those with some stages only."""
    names = ("prepare.yaml", "reward.yaml", BASE)
    folders = RECIPES.iterdir() if RECIPES.is_dir() else ()
    return sorted(folder.name for folder in folders if any((folder / name).exists() for name in names))


def _extended_file(path: Path, extended: Any, where: Path) -> Path:
    """Return the file that `extends` names in the file `where`, for the stage whose file is `path`."""
    if not isinstance(extended, str) or not extended.isprintable():
        raise UserError(
            f"{where}: extends={shorten(extended)}: expected the path of a config file or a recipe"
        )
    file = path.parent / extended
    if not file.exists() and extended in _shipped():
        file = RECIPES / extended
    if where.name == BASE and not file.is_dir():
        raise UserError(f"{where}: extends={extended}: no such recipe{nearest(extended, recipes())}")
    return file / path.name if file.is_dir() else file


def _read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        values = parse_text(text)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{_explain_missing(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML: {one_line(error)}") from None

    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{path}: has more than {MAX_CHARACTERS:,} characters; expected a config file")
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys, found a {type(values).__name__}")
    return values


def _explain_missing(path: Path) -> str:
    """Return what to do about a stage's file that a recipe does not have, or an empty string."""
    if not any(path.parent.glob("*.yaml")):
        return ""
    return f"; write it, or name a recipe that has it in {path.parent / BASE}, such as extends: demo"


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `values` over it; a section merges with a section."""
    merged = dict(base)
    for key, value in values.items():
        is_section = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if is_section else value
    return merged
