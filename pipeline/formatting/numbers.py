"""Figures, times and tables as a person reads them."""

from __future__ import annotations

import json
import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    pass


def format_metric(value: float) -> str:
    """A count in full, another number to three places, a dash for none."""
    return "–" if value != value else f"{value:,}" if isinstance(value, int) else f"{value:z.3f}"


def format_number(value: Any, sign: str = "") -> str:
    return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.4g}"


def format_age(seconds: float | None) -> str:
    """In the largest unit of which there are two."""
    if seconds is None:
        return ""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return "now"


def format_size(count: float) -> str:
    """Of bytes, in powers of 1000."""
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(int(math.log10(count)) // 3, 4) if count >= 1 else 0
    return f"{count / 1000**power:.{1 if power else 0}f} {units[power]}"


def as_finite(value: object) -> float | None:
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) else None


def format_any(value: object, spec: str = "z.4g") -> str:
    """`value` as a person reads it; a float by `spec`, None, NaN and what a template finds undefined as a dash."""
    if value is None or value != value or isinstance(value, jinja2.Undefined):
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return format(float(value), spec) if isinstance(value, Real) else json.dumps(value, ensure_ascii=False, default=str)
