"""Load a stage's config: YAML plus `key=value` overrides in, a validated object out."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.base import BASE_FREE_INITS, StageConfig
from pipeline.config.evaluate import EvaluateStage
from pipeline.config.keys import keys_in_sections, known_keys, reads_text
from pipeline.config.overrides import apply_overrides
from pipeline.config.parsing import resolve
from pipeline.config.ppo import PPOStage
from pipeline.config.prepare import PrepareStage
from pipeline.config.recipes import RECIPES, find_stage_file, read_stage_file, recipes
from pipeline.config.reward import RewardStage
from pipeline.config.sft import SFTStage
from pipeline.config.values import explain_text, nearest, shorten
from pipeline.errors import UserError

STAGES: dict[str, type[StageConfig]] = {
    "prepare": PrepareStage,
    "sft": SFTStage,
    "reward": RewardStage,
    "ppo": PPOStage,
    "evaluate": EvaluateStage,
}


def load(stage: str, file: str | Path, overrides: list[str] | None = None, **common: Any) -> Any:
    """Return the config of `stage` from a YAML file, `key=value` overrides and `common`.

    Each takes precedence over the one before. `common` holds run, seed and force; None is ignored. The run
    defaults to the name of the file's folder. A file that does not exist is that of the recipe which the
    recipe.yaml in its folder extends. Raises `UserError`.
    """
    path = Path(file)
    if not path.exists() and str(file) in recipes():
        raise UserError(f"{path}: no such config file; did you mean --config configs/{file}/{stage}.yaml?")
    values = read_stage_file(path)
    folder = path.resolve().parent
    values.setdefault("run", f"{folder.parent.name}-tiny" if folder.name == "tiny" else folder.name)
    values.setdefault("runs", "runs")
    apply_overrides(values, overrides or [], lambda key: reads_text(STAGES[stage], key))
    values |= {key: value for key, value in common.items() if value is not None}
    try:
        values = resolve(values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None

    config = validate(STAGES[stage], values, str(path))
    config._recipe_folder = find_stage_file(path).parent
    is_recipe = not (path.parent / "manifest.json").exists()  # else it is an artifact's resolved config
    if is_recipe:
        config._recipe = folder.name if folder.parent == RECIPES else str(path.parent)
    return config


def check_run(configs: list[Any]) -> None:
    """Refuse combinations of stages that no stage can check alone. Raises `UserError`."""
    by_stage = {config.stage: config for config in configs}
    splits = by_stage["prepare"].splits if "prepare" in by_stage else None
    if "evaluate" in by_stage and splits and not (splits.validation or splits.test):
        raise UserError(
            "prepare: splits.validation and splits.test are both 0, but evaluate needs held-out prompts; "
            "set splits.test=0.1, or end the run with --until ppo"
        )
    sft, ppo = by_stage.get("sft"), by_stage.get("ppo")
    if not sft or not ppo or ppo.policy != str(sft.folder):
        return
    if sft.lora is None or sft.merge:
        return
    init = sft.lora.get("init_lora_weights", True)
    if init not in BASE_FREE_INITS and ppo.adapter == "continue":
        raise UserError(
            f"ppo: sft publishes a LoRA adapter with init_lora_weights={init}, which changes its base, "
            "so PPO cannot hold a reference beside it; set sft.merge=true, or another "
            "sft.lora.init_lora_weights"
        )
    if ppo.lora is None and ppo.adapter == "continue":
        raise UserError(
            "ppo: sft publishes a LoRA adapter, which PPO trains further, but ppo has no 'lora:' section; "
            "set ppo.lora={}, or ppo.adapter=merge to train all weights of the merged model"
        )


def validate(cls: type[BaseModel], values: Any, where: str) -> Any:
    """Return `cls(**values)`, or raise a `UserError` with the first mistake."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a mapping of keys, found {type(values).__name__}")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(cls, error)}") from None


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    """Return one mistake in one line, an unknown key first: it is often the missing one misspelt."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    key = ".".join(place) or "config"
    if first["type"] == "extra_forbidden":
        section = keys_in_sections(cls, cls.stage).get(key) if issubclass(cls, StageConfig) else None
        close = (
            f"; did you mean {section!r}?"
            if section
            else nearest(place[-1], known_keys(cls, first["loc"][:-1]))
        )
        return f"unknown key {key!r}{close}"
    if first["type"] == "missing":
        return f"{key!r} is missing"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if place else str(first["ctx"]["error"])
    if first["type"] == "string_type" and (problem := explain_text(key, first["input"])):
        return problem
    return f"{key}={shorten(first['input'])}: {first['msg'][0].lower()}{first['msg'][1:]}"
