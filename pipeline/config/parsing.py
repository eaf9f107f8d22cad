"""YAML to plain data with `${key}` interpolation: the only module that calls OmegaConf.

Its readers raise many types of exceptions for a wrong text, Python's own among them; here each is a
`ValueError` with one line. Resolvers, such as `${oc.env:HF_TOKEN}`, are refused: what they return would be
written into config.yaml, the manifest and the model card.
"""

import re
from typing import Any

import yaml
from omegaconf import OmegaConf

from pipeline.config.values import MAX_DEPTH, map_text, shorten
from pipeline.errors import one_line

INNERMOST = re.compile(r"\$\{[^${}:]*\}")  # an interpolation without a resolver, and with no other inside


def parse_text(text: str) -> Any:
    """Return the mapping or list that a YAML text spells; an empty text is an empty mapping."""
    try:
        _check_depth(text)
        return _spell_on(
            OmegaConf.to_container(OmegaConf.create(text) if text.strip() else OmegaConf.create())
        )
    except Exception as error:
        raise ValueError(_explain(error)) from None


def parse_value(text: str) -> Any:
    """Return the value that a YAML text spells, such as `1e-4` or `[a, b]`."""
    try:
        _check_depth(text)
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        return _spell_on(values["value"])
    except Exception as error:
        raise ValueError(_explain(error)) from None


def spell_as_typed(value: Any, text: str) -> Any:
    """Return the value that `text` spells, with each number, true and false as the text that was typed."""

    def spell(value: Any, typed: Any) -> Any:
        if isinstance(value, list) and isinstance(typed, list):
            return [spell(*pair) for pair in zip(value, typed, strict=True)]
        return typed if isinstance(value, bool | int | float) else value

    return spell(value, yaml.load(text, yaml.BaseLoader))


def _spell_on(values: Any) -> Any:
    """Return plain data whose keys `on` are text again: YAML 1.1 reads them as true."""
    if isinstance(values, dict):
        return {"on" if key is True else key: _spell_on(value) for key, value in values.items()}
    return list(map(_spell_on, values)) if isinstance(values, list) else values


def resolve(values: dict[str, Any]) -> Any:
    """Replace each `${key}` by the value of that key. Raises `ValueError`."""
    map_text(_check_interpolation, values)
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except Exception as error:
        raise ValueError(_explain(error)) from None


def _check_depth(text: str) -> None:
    """Raise `ValueError` or `YAMLError` for a text at whose depth libyaml would end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} sections or lists inside each other")


def _check_interpolation(text: str) -> str:
    rest, count = text, 1
    while count:
        rest, count = INNERMOST.subn("", rest)
    if "${" in rest:
        raise ValueError(
            f"{shorten(text)}: only ${{key}}, the value of another key, is read; the environment is not, "
            'because a config is published: for a value that is no secret, set key="$VALUE" on the command '
            "line; the libraries read HF_TOKEN themselves"
        )
    return text


def _explain(error: Exception) -> str:
    """Return the message without OmegaConf's types."""
    return re.sub(r" full_key: (\S*) object_type=.*", r", key \1", one_line(error))
