"""How a reward changes before its weight in a sum: it is normalized, and then clipped or transformed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.config import Reward
from pipeline.errors import UserError
from pipeline.reward.calls import ResponseReward, call_reward_functions
from pipeline.reward.functions import RewardSource
from pipeline.reward.references import ReferenceScores, Scores, preference
from pipeline.reward.running import RunningStatistics
from pipeline.reward.token_rewards import total_reward


class Shape(NamedTuple):
    """The changes of a reward. With `running`, mean and deviation are those of the rewards so far."""

    mean: float = 0.0
    std: float = 1.0
    clip: float | None = None
    running: RunningStatistics | None = None
    references: ReferenceScores | None = None

    def apply(
        self,
        rewards: Sequence[ResponseReward | None],
        prompts: Sequence[Any],
        columns: dict[str, Any],
        is_training: bool,
    ) -> list[ResponseReward | None]:
        """Return the changed rewards of the responses to `prompts`, whose records have `columns`.

        None stays None, and has no part in running statistics. A reward is transformed as its sum over the
        tokens, and is then that of the whole response. Raises `UserError` if a prompt has no references.
        """
        mean, std = self.mean, self.std
        if self.running is not None:
            valid = [total_reward(reward) for reward in rewards if reward is not None]
            mean, std = self.running.find_scale(valid, is_training)
        if self.references is None:
            return [None if r is None else shape_reward(r, mean, std, self.clip) for r in rewards]
        references = self.references.find_scores(prompts, columns)
        return [
            None if reward is None else preference(total_reward(reward), scores, std)
            for reward, scores in zip(rewards, references, strict=True)
        ]


def shape_source(source: RewardSource, reward: Reward, label: str, name: str) -> RewardSource:
    """Return a source for a sum: with its name, and with the shape that its section says.

    Raises `UserError` if it is to be normalized by a reference sample and has none.
    """
    if not reward.is_shaped:
        return source._replace(name=name)
    mean, std = 0.0, 1.0
    if reward.normalize == "reference":
        mean, std = source.mean, source.std
        if (mean, std) == (0.0, 1.0):
            raise UserError(
                f"{label}: normalize: reference needs the reference sample of a reward stage, and this model "
                "has none; set normalize: running, or scale the reward by its weight"
            )
    shape = Shape(
        mean,
        std,
        reward.clip,
        RunningStatistics() if reward.normalize == "running" else None,
        ReferenceScores(reward.references) if reward.transform == "sigmoid" else None,
    )
    if (reward.normalize, reward.transform) != ("none", "none"):  # the sample of the reward is not its own
        source = source._replace(mean=0.0, std=1.0)
    return source._replace(name=name, shape=shape)


def split_referring(
    sources: Sequence[RewardSource],
) -> tuple[list[RewardSource], list[ReferenceScores]]:
    """Return the sources whose rewards are compared with those of references, and these."""
    pairs = [(source, source.shape.references) for source in sources if source.shape is not None]
    referring = [(source, references) for source, references in pairs if references is not None]
    return [source for source, _ in referring], [references for _, references in referring]


def score_references(sources: Sequence[RewardSource], *batch: Any) -> list[Scores]:
    """Return for each response of a batch its reward by every source.

    `batch` are the arguments of `call_reward_functions` behind the functions.
    """
    rewards = call_reward_functions([source.score for source in sources], *batch)
    totals = [[None if reward is None else total_reward(reward) for reward in column] for column in rewards]
    return list(map(list, zip(*totals, strict=True)))


def shape_reward(reward: ResponseReward, mean: float, std: float, clip: float | None) -> ResponseReward:
    """Return (reward − mean) / std, clipped to ± `clip`.

    Of the rewards of tokens, all are divided, the mean is subtracted on the last one, and each is clipped.
    """
    is_list = isinstance(reward, list)
    values = list(reward) if isinstance(reward, list) else [reward]
    if values:
        values[-1] -= mean
    values = [value / std for value in values]
    if clip is not None:
        values = [min(max(value, -clip), clip) for value in values]
    return values if is_list else values[0]
