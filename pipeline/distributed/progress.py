"""Progress bars of long steps: on the terminal of rank 0, and nowhere else. Imports no torch."""

from typing import Any

from tqdm import tqdm

from pipeline.distributed.processes import is_main_process


def progress_bar(what: str, unit: str, over: Any = None, total: int | None = None, **options: Any) -> Any:
    """A bar over an iterable, or one of `total` units that is moved by `update`; where nobody watches it shows nothing."""
    return tqdm(
        over,
        desc=f"  {what}",
        unit=f" {unit}",
        total=total,
        disable=None if is_main_process() else True,
        leave=False,
        **options,
    )
