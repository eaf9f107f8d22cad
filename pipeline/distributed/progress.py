"""Progress bars of long steps: on the terminal of rank 0, and nowhere else. Imports no torch."""

from typing import Any

from tqdm import tqdm

from pipeline.distributed.processes import is_main_process


def progress_bar(
    description: str, unit: str, items: Any = None, total: int | None = None, **options: Any
) -> Any:
    """Return a progress bar over `items`, or one of `total` units that `update` advances.

    `options` are keyword arguments of `tqdm`. The bar is hidden without a terminal and on the other ranks.
    """
    return tqdm(
        items,
        desc=f"  {description}",
        unit=f" {unit}",
        total=total,
        disable=None if is_main_process() else True,
        leave=False,
        **options,
    )
