"""Give each `key=value` of a command line to its stage, and name the key in full if it was not."""

import re
from collections.abc import Sequence

from pipeline import config
from pipeline.config.keys import keys_in_sections
from pipeline.errors import UserError


def split_overrides(overrides: Sequence[str], last: str, stages: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of each stage. Raises `UserError`.

    `stage.key=value` goes to its stage. A bare `key=value` goes to all stages if all have the key (`runs`),
    else to the `last` one.
    """
    by_stage: dict[str, list[str]] = {stage: [] for stage in stages}
    for item in overrides:
        stage, dot, rest = item.partition(".")
        if item.partition("=")[0] in config.StageConfig.model_fields:
            for items in by_stage.values():
                items.append(item)
        elif dot and stage in config.STAGES:
            if stage not in by_stage:
                raise UserError(f"override {item!r}: the run ends with {last!r}, before {stage!r}")
            _require_key(item, rest, stage, [f"{stage}.{key}" for key in _full_keys(rest, stage)])
            by_stage[stage].append(rest)
        else:
            full = [f"{stage}.{key}" for stage in stages for key in _full_keys(item, stage)]
            _require_key(item, item, last, full)
            by_stage[last].append(item)
    return by_stage


def check_overrides(overrides: Sequence[str], stage: str) -> None:
    """Raise `UserError` for an override of one stage's command whose key is in a section, or has a prefix."""
    for item in overrides:
        first, dot, rest = item.partition(".")
        is_prefixed = dot and first == stage
        _require_key(item, item, stage, [rest] if is_prefixed else _full_keys(item, stage))


def _require_key(item: str, override: str, stage: str, full: Sequence[str]) -> None:
    """Raise `UserError` if `stage` does not have the key, and `full` are what may have been meant."""
    name = _first_part(override)
    if full and name not in config.STAGES[stage].model_fields:
        raise UserError(f"override {item!r}: {stage} has no key {name!r}; type {' or '.join(full)}")


def _full_keys(override: str, stage: str) -> list[str]:
    """Return an override with the section in front that its key is in; the key may be the stage's own."""
    name, cls = _first_part(override), config.STAGES[stage]
    key = name if name in cls.model_fields else keys_in_sections(cls, stage).get(name)
    return [key + override[len(name) :]] if key else []


def _first_part(override: str) -> str:
    return re.split(r"[.=\[]", override, maxsplit=1)[0]
