"""JSON Schemas of the stages' configs, with which editors complete, describe and check keys.

`scripts/write_reference.py` writes configs/schemas/<stage>.json from the config classes and from `PPOConfig`.
A schema accepts what the loader accepts: `extends`, interpolations such as `${run}`, and a file without the
keys that an extended file or an override brings.
"""

import json
from typing import Any

from pydantic import TypeAdapter

from pipeline.config import RECIPES, STAGES

Schema = dict[str, Any]

SCHEMAS = RECIPES / "schemas"
DOCUMENTATION = {  # the libraries' own arguments
    "transformers.TrainingArguments": (
        "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
    ),
    "trl.SFTConfig": "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig",
    "trl.RewardConfig": "https://huggingface.co/docs/trl/reward_trainer#trl.RewardConfig",
    "trl.RLOOConfig": "https://huggingface.co/docs/trl/rloo_trainer#trl.RLOOConfig",
    "trl.GRPOConfig": "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig",
    "peft.LoraConfig": "https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig",
}
ARGUMENTS = {  # the classes whose arguments `training:` takes
    "sft": ("trl.SFTConfig", "transformers.TrainingArguments"),
    "reward": ("trl.RewardConfig", "transformers.TrainingArguments"),
    "ppo": ("transformers.TrainingArguments", "trl.RLOOConfig", "trl.GRPOConfig"),
}
CHANGED_DEFAULTS: dict[str, Schema] = {  # of TrainingArguments; `pipeline.training.arguments` sets them
    "logging_steps": {
        "type": "number",
        "default": 10,
        "description": "Steps between log entries.",
    },
    "save_total_limit": {
        "anyOf": [{"type": "integer"}, {"type": "null"}],
        "default": 2,
        "description": "Number of checkpoints that are kept.",
    },
    "gradient_checkpointing": {
        "type": "boolean",
        "default": False,
        "description": "Recompute activations in the backward pass, to save memory.",
    },
    "dataloader_pin_memory": {
        "type": "boolean",
        "default": False,
        "description": "Pin the batches' memory for faster copies to a GPU.",
    },
    "report_to": {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "default": "none",
        "description": "Experiment trackers to log to, such as tensorboard, wandb or mlflow.",
    },
    "run_name": {
        "type": "string",
        "default": "${run}-STAGE",
        "description": "Name of the run in the trackers.",
    },
}
SOURCES = ("#/$defs/Reward", "#/$defs/FunctionSection")  # sections that a string, their source, stands for
INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}
NUMBER_AS_TEXT = {"type": "string", "pattern": r"\$\{.+\}|^[-+]?[0-9.][0-9.eE+-]*$"}


def build_schema(stage: str) -> Schema:
    """Return the schema of a stage's file, as configs/schemas/ holds it. Imports torch for `ppo`."""
    return _accept_files(describe_stage(stage, describe_training(stage)))


def read_schema(stage: str) -> Schema:
    """Return the schema that came with the package."""
    schema: Schema = json.loads((SCHEMAS / f"{stage}.json").read_text(encoding="utf-8"))
    return schema


def write_schemas() -> None:
    """Write the schema of each stage to configs/schemas/."""
    SCHEMAS.mkdir(exist_ok=True)
    for stage in STAGES:
        text = json.dumps(build_schema(stage), indent=2, ensure_ascii=False) + "\n"
        (SCHEMAS / f"{stage}.json").write_text(text, encoding="utf-8")


def describe_stage(stage: str, training: Schema | None = None) -> Schema:
    """Return the schema of a stage's class, with its required keys and the described keys of `training:`.

    `training` defaults to the keys in the schema that came with the package, so that torch is not imported.
    """
    schema = STAGES[stage].model_json_schema()
    if stage in ARGUMENTS:
        if training is None:
            training = read_schema(stage)["properties"]["training"]["properties"]
        schema["properties"]["training"]["properties"] = training
    return _tidy(schema)


def describe_training(stage: str) -> Schema:
    """Return our keys of `training:`: changed defaults and, for `ppo`, the fields of `PPOConfig`."""
    if stage not in ARGUMENTS:
        return {}
    keys = {name: dict(key) for name, key in CHANGED_DEFAULTS.items()}
    keys["run_name"]["default"] = f"${{run}}-{stage}"
    if stage != "ppo":
        return keys

    from pipeline.ppo.config import CHOICES, PPOConfig

    for name, hint in PPOConfig.__annotations__.items():
        field = PPOConfig.__dataclass_fields__[name]
        if "help" not in field.metadata:
            continue
        key = TypeAdapter(hint).json_schema()
        if name in CHOICES:
            key["enum"] = list(CHOICES[name])
        keys[name] = key | {"default": field.default, "description": field.metadata["help"]}
    return keys


def _tidy(node: Any) -> Any:
    """Drop pydantic's titles, and join the lines of descriptions."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    tidied = {key: _tidy(value) for key, value in node.items() if key != "title" or isinstance(value, dict)}
    if isinstance(node.get("description"), str):
        tidied["description"] = " ".join(node["description"].split())
    return tidied


def _accept_files(schema: Schema) -> Schema:
    """Return `schema` as a file's: keys that another file or an override may bring are not required."""
    definitions = {name: _accept_section(section) for name, section in schema.get("$defs", {}).items()}
    definitions |= {"Interpolation": INTERPOLATION, "NumberAsText": NUMBER_AS_TEXT}
    accepted = _accept_section(schema) | {"$defs": definitions}
    extends = {
        "type": "string",
        "description": "Config file to merge this one over: a path from here, or the recipe that has it.",
    }
    accepted["properties"] = {"extends": extends} | accepted["properties"]
    return {"$schema": "http://json-schema.org/draft-07/schema#"} | accepted


def _accept_section(section: Schema) -> Schema:
    accepted = {key: value for key, value in section.items() if key != "required"}
    if "properties" in section:
        accepted["properties"] = {name: _accept_value(key) for name, key in section["properties"].items()}
    return accepted


def _accept_value(key: Schema) -> Schema:
    """Return a key's schema with interpolations, an item in place of a list, and short forms."""
    key = _accept_section(key)
    if "properties" in key:
        return key
    notes = {name: key.pop(name) for name in ("default", "description") if name in key}
    options = [option for each in key.pop("anyOf", [key]) for option in _accept_option(each)]
    if notes.get("default") == []:
        options.append({"type": "null"})
    if any(option.get("type") in ("integer", "number") for option in options):
        options.append({"$ref": "#/$defs/NumberAsText"})
    elif {"type": "string"} not in options:
        options.append({"$ref": "#/$defs/Interpolation"})
    return (options[0] if len(options) == 1 else {"anyOf": options}) | notes


def _accept_option(option: Schema) -> list[Schema]:
    if option.get("type") == "array" and "$ref" in option.get("items", {}):
        items = _accept_option(option["items"])
        return [*items, option | {"items": items[0] if len(items) == 1 else {"anyOf": items}}]
    if option.get("$ref") in SOURCES:
        return [option, {"type": "string"}]
    if option.get("additionalProperties", {}) in [{"$ref": section} for section in SOURCES]:
        return [option | {"additionalProperties": {"anyOf": _accept_option(option["additionalProperties"])}}]
    return [option]
