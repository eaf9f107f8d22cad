"""YAML plus `key=value` overrides in, a stage's config out."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipeline.config.stages import STAGES
from pipeline.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent
RECIPES = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"  # of a wheel, of a checkout


def load(stage: str, file: str | Path, overrides: list[str] | None = None, **common: Any) -> Any:
    """The config of `stage` from a YAML file, overridden by `key=value` strings and by `common` (run, seed, force; None is ignored).

    The run is named after the file's folder unless told otherwise. Raises `UserError`.
    """
    path = Path(file)
    if not path.exists() and str(file) in recipes():
        raise UserError(f"{path}: no such config file; did you mean --config configs/{file}/{stage}.yaml?")
    base = _read(path)
    folder = path.resolve().parent
    defaults = {"run": f"{folder.parent.name}-tiny" if folder.name == "tiny" else folder.name, "runs": "runs"}
    given = {key: value for key, value in common.items() if value is not None}
    try:
        merged = OmegaConf.merge(defaults, base)
        for key, value in _pairs(overrides or []):
            OmegaConf.update(merged, key, value, merge=False, force_add=True)
        merged = OmegaConf.merge(merged, given)
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    config = validate(STAGES[stage], values, str(path))
    config._recipe_folder = path.parent
    if not (path.parent / "manifest.json").exists():  # else it is the resolved config of an artifact, whose recipe nobody knows
        config._recipe = path.resolve().parent.name if path.resolve().parent.parent == RECIPES else str(path.parent)
    return config


def check_run(configs: list[Any]) -> None:
    """Refuse what no stage can see alone. Raises `UserError`."""
    by_stage = {config.stage: config for config in configs}
    held_out = by_stage["prepare"].splits
    if "evaluate" in by_stage and not (held_out.validation or held_out.test):
        raise UserError(
            "prepare: splits.validation and splits.test are both 0, and evaluate measures on prompts held out; "
            "set splits.test=0.1, or stop before with --until ppo"
        )
    sft, ppo = by_stage.get("sft"), by_stage.get("ppo")
    if sft and ppo and sft.lora is not None and not sft.merge and ppo.lora is None and ppo.policy == str(sft.folder):
        raise UserError("ppo: sft publishes a LoRA adapter, from which the policy goes on, but ppo has no 'lora:' section; set ppo.lora={}")


def validate(cls: type[BaseModel], values: Any, where: str) -> Any:
    """`cls(**values)`, or a `UserError` with the first thing that is wrong."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of keys, found {type(values).__name__}")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(cls, error)}") from None


def nearest(name: str, known: Any) -> str:
    """` (did you mean …?)` or nothing, for an error message."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def recipes() -> list[str]:
    return sorted(folder.name for folder in RECIPES.iterdir() if (folder / "prepare.yaml").exists()) if RECIPES.is_dir() else []


def _read(path: Path, extending: tuple[Path, ...] = ()) -> DictConfig:
    """A YAML file, `${recipe}` in it standing for its folder, over the file that its key `extends` names, a path from there."""
    if path.resolve() in extending:
        raise UserError(f"{path}: extends itself, by way of {' and '.join(map(str, extending))}")
    try:
        text = path.read_text(encoding="utf-8").replace("${recipe}", os.path.relpath(path.parent))
        base = OmegaConf.create(text) if text.strip() else OmegaConf.create()
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(base, DictConfig):
        raise UserError(f"{path}: expected a mapping of keys, found a list")
    extended = base.pop("extends", None)
    if extended is None:
        return base
    merged = OmegaConf.merge(_read(path.parent / str(extended), (*extending, path.resolve())), base)
    assert isinstance(merged, DictConfig)
    return merged


def _pairs(overrides: list[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value as YAML reads it) of each override."""
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise UserError(f"override {item!r}: expected key=value, such as training.learning_rate=1e-4")
        try:
            yield key, OmegaConf.from_dotlist([f"value{item[len(key) :]}"])["value"]
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"override {item!r}: its value is not readable as YAML: {_one_line(error)}; quote it") from None


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    # An unknown key is often the missing one misspelt: it is told first.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    key = ".".join(place) or "config"
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(place[-1], _keys(cls, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{key!r} is missing"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if place else str(first["ctx"]["error"])
    return f"{key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys(cls: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at `place` inside `cls`."""
    schema = cls.model_json_schema()
    node: Any = schema
    for part in place:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        for option in [node, *node.get("anyOf", []), *node.get("allOf", [])]:
            if "$ref" in option:
                node = schema["$defs"][option["$ref"].rsplit("/", 1)[1]]
    return list(node.get("properties", {}))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
