"""The configuration reference: every key of a stage with its type, its default and one sentence.

`rlhf config` prints it; `scripts/write_reference.py` writes it to docs/configuration.md.
"""

import json
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.config import STAGES, nearest
from pipeline.errors import UserError
from pipeline.tools.reference.schemas import ARGUMENTS, DOCUMENTATION, Schema, describe_stage

INTRODUCTION = """# Configuration

A recipe has one YAML file per stage, and these are its keys. `rlhf config STAGE` prints them too, and
`rlhf config STAGE KEY` prints one. On the command line, `key=value` overrides a key: `training.kl_coef=0.1`.
An unknown key is an error.

- `extends: demo` merges the file over the same stage's file of that recipe, a shipped one or a folder's path.
  `extends: ../mine/ppo.yaml` names a file.
- A recipe needs only the stages that it changes. `recipe.yaml` names the recipe that has the others, also by
  `extends: demo`, its one key. Without it, each stage that is run needs its file.
- `${key}` is the value of another key, `${recipe}` is the folder of the file, and `${recipes}` is the folder
  of the shipped recipes. `${oc.env:NAME}` is refused, and so is a password or a token: a config is published
  with its artifact. Libraries read `HF_TOKEN` and `WANDB_API_KEY` from the environment, and a served reward
  model's key is `REWARD_API_KEY`.
- A dot separates a section from its key. The keys of a list's items are named without a position; an override
  needs it if the list has several: `source.0.path=answers.csv`.
- A key that is text keeps what is typed on the command line: `positive_label=true`, `revision=1e5`. In a file
  it needs quotes.
- A value under `training:` or `lora:` is checked by type and range before a model is loaded. A key that the
  stage sets itself, that nothing reads, or that would break resuming or the published model is refused with
  the reason, such as `save_only_model`, `packing`, `deepspeed` (the launch shards weights) and `hub_token`.

The first line of each shipped file names its JSON Schema, with which editors complete and check keys.
`rlhf config STAGE --schema` prints it. `python scripts/write_reference.py` writes this page and the schemas.
"""


ALGORITHMS = {
    "transformers.TrainingArguments": "algorithm: ppo, with the keys above",
    "trl.RLOOConfig": "algorithm: rloo",
    "trl.GRPOConfig": "algorithm: grpo",
}
REQUIRED, FOLDER = "required", "the folder's name"  # in place of a default's value


class Key(NamedTuple):
    """A key: its dotted name, type, default and description, all as text."""

    name: str
    type: str
    default: str
    description: str


def list_keys(stage: str, training: Schema | None = None) -> list[Key]:
    """Return the keys of a stage; `training` as for `describe_stage`."""
    schema = describe_stage(stage, training)
    return list(_walk(schema, schema.get("$defs", {}), ""))


def select_keys(stage: str, name: str | None) -> list[Key]:
    """Return the key `name` and those below it, or all keys. Raises `UserError`."""
    keys = list_keys(stage)
    if name is None:
        return keys
    selected = [key for key in keys if key.name == name or key.name.startswith(f"{name}.")]
    if selected:
        return selected

    section, _, last = name.rpartition(".")
    siblings = [key.name.removeprefix(f"{section}.") for key in keys if key.name.startswith(f"{section}.")]
    if section in ("training", "lora") and stage in ARGUMENTS:
        links = ", ".join(_links(stage, section).values())
        hint = nearest(last, siblings) or f" of this project; for the libraries' own see {links}"
    else:
        hint = nearest(last, siblings) if siblings else nearest(name, [key.name for key in keys])
    raise UserError(f"rlhf config {stage}: no key {name!r}{hint}")


def format_text(stage: str, name: str | None = None) -> str:
    """Return the reference of a stage, or of its keys below `name`, for a terminal. Raises `UserError`."""
    width = shutil.get_terminal_size().columns - 2
    lines = []
    if name is None:
        lines += [*textwrap.wrap(f"{stage}: {_describe(stage)}", width), ""]
    for key in select_keys(stage, name):
        default = key.default if key.default in ("", REQUIRED) else f"default {key.default}"
        lines.append(f"{key.name}  ({', '.join(filter(None, (key.type, default)))})")
        lines += textwrap.wrap(key.description, width, initial_indent="    ", subsequent_indent="    ")
    if name is None and stage in ARGUMENTS:
        lines += ["", "The libraries' own keys:"]
        for section in ("training", "lora"):
            lines += [f"  {section}: {title}  {url}" for title, url in _links(stage, section).items()]
    return "\n".join(lines)


def format_markdown() -> str:
    """Return docs/configuration.md."""
    return "\n".join([INTRODUCTION, *map(_format_section, STAGES)])


def _format_section(stage: str) -> str:
    lines = [
        f"## {stage}",
        "",
        _describe(stage),
        "",
        "| key | type | default | description |",
        "| --- | --- | --- | --- |",
    ]
    for key in list_keys(stage):
        default = key.default if key.default in ("", REQUIRED, FOLDER) else f"`{key.default}`"
        lines.append(f"| `{key.name}` | {key.type} | {default} | {key.description} |")
    lines.append("")
    if stage in ARGUMENTS:
        for section in ("training", "lora"):
            links = ", ".join(f"[{title}]({url})" for title, url in _links(stage, section).items())
            lines.append(f"- `{section}` takes the arguments of {links}.")
        lines.append("")
    return "\n".join(lines)


def _describe(stage: str) -> str:
    return " ".join((STAGES[stage].__doc__ or "").split())


def _links(stage: str, section: str) -> dict[str, str]:
    if section == "lora":
        return {"peft.LoraConfig": DOCUMENTATION["peft.LoraConfig"]}
    if stage == "ppo":
        return {f"{title} ({ALGORITHMS[title]})": DOCUMENTATION[title] for title in ARGUMENTS[stage]}
    return {title: DOCUMENTATION[title] for title in ARGUMENTS[stage]}


def _walk(section: Schema, definitions: Schema, prefix: str) -> Iterator[Key]:
    """Yield the keys of a section and, below each, those of the sections in it."""
    required = section.get("required", [])
    for name, key in section.get("properties", {}).items():
        inner = _find_section(key, definitions)
        yield Key(
            prefix + name,
            _format_type(key),
            FOLDER if prefix + name == "run" else _format_default(key, name in required, bool(inner)),
            key.get("description") or (inner or {})["description"],
        )
        if inner:
            yield from _walk(inner, definitions, f"{prefix}{name}.")


def _options(key: Schema) -> list[Schema]:
    """Return the alternatives of a key that a reader chooses among."""
    generic = ("#/$defs/Interpolation", "#/$defs/NumberAsText")
    return [option for option in key.get("anyOf", [key]) if option.get("$ref") not in generic]


def _find_section(key: Schema, definitions: Schema) -> Schema | None:
    """Return the section behind a key, also as the item of a list."""
    if "properties" in key:
        return key
    for option in _options(key):
        reference = option.get("$ref") or option.get("items", {}).get("$ref")
        if reference:
            section: Schema = definitions[reference.rsplit("/", 1)[1]]
            return section
    return None


def _format_type(key: Schema) -> str:
    return " or ".join(_format_option(option) for option in _options(key))


def _format_option(option: Schema) -> str:
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    if "$ref" in option or "properties" in option:
        return "section"
    if option["type"] == "array":
        return f"list of {_format_type(option['items'])}s"
    if option["type"] == "object":
        return "mapping"
    limits = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {option[name]}" for name, sign in limits.items() if name in option]
    return f"{option['type']} {', '.join(bounds)}".strip()


def _format_default(key: Schema, required: bool, is_section: bool) -> str:
    if required:
        return REQUIRED
    default: Any = key.get("default")
    if is_section and isinstance(default, dict):
        return ""
    return "null" if default is None else json.dumps(default, ensure_ascii=False)
