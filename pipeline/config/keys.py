"""What a stage's JSON Schema says about its keys: which there are, which are text, and in which section."""

from functools import cache
from typing import Any

from pydantic import BaseModel

from pipeline.config.parsing import parse_text
from pipeline.config.recipes import RECIPES

Place = tuple[int | str, ...]


def known_keys(cls: type[BaseModel], place: Place = ()) -> list[str]:
    """Return the keys allowed at `place` inside `cls`; numbers are the items of lists."""
    return list(_node_at(cls, place).get("properties", {}))


def reads_text(cls: type[BaseModel], path: list[str]) -> bool:
    """Return whether the key at `path` is text, or a list of texts, and nothing else but null."""
    options = _options(_node_at(cls, tuple(path)))
    options += [item for option in options for item in _options(option.get("items", {}))]
    types = {option["type"] for option in options if "type" in option}
    return "string" in types and types <= {"string", "array", "null"}


@cache
def keys_in_sections(cls: type[BaseModel], stage: str) -> dict[str, str]:
    """Return by name the dotted keys one section below a stage: `path` is `source.path`.

    Those of `training` and `lora` are the ones that the shipped recipes set, because their classes belong to
    the libraries.
    """
    keys: dict[str, str] = {}
    for path in sorted(RECIPES.glob(f"*/{stage}.yaml")):
        values: dict[str, Any] = parse_text(path.read_text(encoding="utf-8"))
        for section in ("training", "lora"):
            keys |= {key: f"{section}.{key}" for key in values.get(section) or {}}
    for section in known_keys(cls):
        inner = known_keys(cls, (section,)) or known_keys(cls, (section, 0))
        keys |= {key: f"{section}.{key}" for key in inner if key not in keys}
    return keys


def _node_at(cls: type[BaseModel], place: Place) -> dict[str, Any]:
    """Return the schema at `place`; a list of one may be named as its item."""
    schema = _schema(cls)
    node: Any = schema
    for part in place:
        is_item = isinstance(part, int) or part.isdecimal()
        if "items" in node:
            node = _follow(schema, node["items"])
            if is_item:
                continue
        elif is_item and "properties" in node:
            continue
        others = node.get("additionalProperties")
        node = node.get("properties", {}).get(part, others if isinstance(others, dict) else {})
        node = _follow(schema, node)
    return node


@cache
def _schema(cls: type[BaseModel]) -> dict[str, Any]:
    return cls.model_json_schema()


def _follow(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Return the section that a node refers to, or the node."""
    for option in [*_options(node), *node.get("allOf", [])]:
        if "$ref" in option:
            section: dict[str, Any] = schema["$defs"][option["$ref"].rsplit("/", 1)[1]]
            return section
    return node


def _options(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [node, *node.get("anyOf", [])]
