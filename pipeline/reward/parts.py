"""`rewards.json` of a policy: the parts of the sum that it was trained on, for stages that read the same sum.

Each part has the `source`, the `arguments` and the `name` of its section. The `mean` and the `std` are those
that evaluations normalize by, null without running statistics.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import read_json, write_json
from pipeline.config import Reward
from pipeline.errors import UserError
from pipeline.reward.functions import RewardSource

REWARDS_FILE = "rewards.json"


def write_rewards(folder: Path, sections: Sequence[Reward], parts: Sequence[RewardSource]) -> None:
    """Write the parts of a sum, whose sections these are; a reward alone has none."""
    if not parts:
        return
    rows = []
    for section, part in zip(sections, parts, strict=True):
        running = part.shape.running if part.shape is not None else None
        mean, std = (running and running.first) or (None, None)
        row = {"source": section.source, "arguments": section.arguments, "name": part.name}
        rows.append(row | {"mean": mean, "std": std})
    write_json(folder / REWARDS_FILE, {"rewards": rows})


def read_rewards(folder: Path) -> list[dict[str, Any]]:
    """Return the parts that `write_rewards` wrote, [] if the folder has none."""
    rows = read_json(folder / REWARDS_FILE).get("rewards", [])
    return rows if isinstance(rows, list) else []


def restore_scale(source: RewardSource, section: Reward, rows: Sequence[dict[str, Any]], label: str) -> None:
    """Set the scale of a source that running statistics normalize to that of its section's part.

    Raises `UserError` if no part of `rows` is this source, or its part has no scale.
    """
    if source.shape is None or source.shape.running is None:
        return
    key = (section.source, section.arguments)
    scales = [(row["mean"], row["std"]) for row in rows if (row["source"], row["arguments"]) == key]
    if not scales or None in scales[0]:
        raise UserError(
            f"{label}: normalize: running is by the rewards in training, and the ppo artifact has none of "
            f"this reward in {REWARDS_FILE}; set normalize: reference or none"
        )
    source.shape.running.first = scales[0]
