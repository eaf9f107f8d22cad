"""Format numbers, ages and sizes for people. Imports no torch."""

import json
import math
from numbers import Real


def format_number(value: object, spec: str = "z.4g") -> str:
    """Format a float by `spec` and a count in full; None and NaN become a dash, other values JSON."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:+,}" if spec.startswith("+") else f"{value:,}"
    if isinstance(value, Real):
        return format(float(value), spec)
    return json.dumps(value, ensure_ascii=False, default=str)


def format_metric(value: float) -> str:
    """Format a metric to three decimals, a count in full."""
    return format_number(value, "z.3f")


def format_age(seconds: float | None) -> str:
    """Format an age in the largest unit of which it has at least two; None becomes an empty string."""
    if seconds is None:
        return ""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return "now"


def format_size(count: float) -> str:
    """Format a number of bytes in powers of 1000."""
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(int(math.log10(count)) // 3, 4) if count >= 1 else 0
    return f"{count / 1000**power:.{1 if power else 0}f} {units[power]}"


def as_finite(value: object) -> float | None:
    """Return a finite number as a float, and None for everything else, including booleans."""
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
