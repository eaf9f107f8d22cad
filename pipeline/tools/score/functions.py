"""Score responses with a reward function, which the other columns of a row reach, as a prompt's do in PPO.

Responses of a file have no token ids: the function gets empty `completion_ids`, and `ended` is true.
"""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import hash_file
from pipeline.config import Reward
from pipeline.data.readers import ParsedRecord
from pipeline.distributed.processes import is_main_process
from pipeline.errors import UserError
from pipeline.reward.calls import RewardFunction, call_reward_function
from pipeline.reward.importing import open_function
from pipeline.reward.token_rewards import total_reward


def load_function(reward: Reward, **options: Any) -> tuple[str, RewardFunction]:
    """Return the identity of a reward function, which changes with its file, and the function.

    `options` are those of a reward model. Raises `UserError` if one of them is set.
    """
    for name, value in {"positive_label": reward.positive_label, **options}.items():
        if value:
            raise UserError(
                f"--{name.replace('_', '-')}: is only read with a reward model, but {reward.source} is a "
                "function; remove it"
            )
    function = open_function("--reward", reward)
    file = getattr(sys.modules[reward.source.partition(":")[0]], "__file__", None)
    return f"{reward.source} {hash_file(Path(file)) if file else ''}".strip(), function


def note_missing_ids(command: str, source: str, function: RewardFunction) -> None:
    """Print that a function which names `completion_ids` gets empty ones."""
    if is_main_process() and "completion_ids" in inspect.signature(function).parameters:
        print(f"{command}: {source} gets empty completion_ids, because a text has no token ids", flush=True)


def score_items(
    function: RewardFunction,
    items: Sequence[ParsedRecord],
    names: Sequence[str],
    texts: Sequence[str],
    ids: Sequence[Sequence[int]] | None = None,
    ended: Sequence[bool] | None = None,
) -> list[float]:
    """Return the reward of each text, a response to the prompt of its item.

    The function gets the columns `names` of the items' rows; a column that a row lacks is None. Raises
    `UserError` if the function fails.
    """
    columns = {name: [item.rows[0].data.get(name) for item in items] for name in names}
    prompts = [item.record["prompt"] for item in items]
    rewards = call_reward_function(
        function, prompts, texts, ids or [[]] * len(texts), ended or [True] * len(texts), columns
    )
    return list(map(total_reward, rewards))
