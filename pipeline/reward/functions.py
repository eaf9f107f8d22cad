"""Reward sources: everything that scores responses, behind TRL's signature of a reward function.

`(prompts, completions, completion_ids, ended, **columns) -> list`:

- `prompts`: the user's prompts, never with the policy's markup.
- `completions`, `completion_ids`: the responses as text, and their token ids.
- `ended`: whether each response ended by itself.
- `columns`: the other columns of the prompt's record.

Each entry of the list is the reward of a response: a number, which counts on its last token, one number per
token of its `completion_ids`, `StepRewards`, or None for no reward.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.config import Reward
from pipeline.errors import UserError
from pipeline.reward.calls import RewardFunction
from pipeline.reward.model import RewardModel
from pipeline.reward.remote import load_remote, require_remote
from pipeline.reward.token_rewards import StepRewards

if TYPE_CHECKING:
    from pipeline.reward.shaping import Shape


class RewardSource(NamedTuple):
    """A reward function, the statistics of its reward, and its model.

    `mean` and `std` are those of the reward on a reference sample, 0 and 1 if unknown. `model` is None for a
    function without one. In a sum, `shape` changes each reward before its weight, and the mean of the reward
    as it was is logged by its `name`, if it has one. A sum has its sources in `parts`, and its score in
    training, which running statistics learn from, in `training_score`.
    """

    score: RewardFunction
    mean: float = 0.0
    std: float = 1.0
    model: RewardModel | None = None
    name: str = ""
    shape: "Shape | None" = None
    parts: "tuple[RewardSource, ...]" = ()
    training_score: RewardFunction | None = None

    @property
    def for_training(self) -> RewardFunction:
        """The score in training."""
        return self.training_score or self.score


def require_reward(reward: Reward, make_command: str, trust_remote_code: bool = False) -> Artifact:
    """Open a reward model as an input of a stage; `make_command` is the command that makes it.

    A server is asked for a score. Raises `UserError` if the model is missing or the server does not answer.
    """
    return (
        require_remote(reward, make_command, trust_remote_code)
        if reward.is_url
        else require_artifact(reward.source, "reward", make_command)
    )


def load_reward(reward: Reward, opened: Artifact, **options: Any) -> RewardModel:
    """Load the reward model that `require_reward` opened; `options` go to `RewardModel.load`.

    Raises `UserError` if it cannot be loaded.
    """
    if reward.is_url:
        return load_remote(reward, opened, **options)
    return RewardModel.load(
        opened.path, revision=opened.revision, positive_label=reward.positive_label, **options
    )


def reward_from_model(model: RewardModel, length_penalty: float = 0.0) -> RewardSource:
    """Return a reward model as a source; it encodes the text with its own tokenizer.

    A stepwise model rewards each step with alpha · (2p − 1) for the probability p that it is right: the mean
    of +1 for a right step and −1 for a wrong one. These rewards are used as they are, with mean 0 and
    standard deviation 1.

    `length_penalty` is the share of length's effect on the reward to subtract, by the slope on the reference
    sample; 1 is all of it. Raises `UserError` if the slope is unknown, or if the model is stepwise.
    """
    settings, alpha = model.settings, model.settings.alpha
    if settings.is_stepwise:
        return _reward_steps(model, length_penalty)
    if length_penalty and (settings.length_slope is None or settings.length_mean is None):
        raise UserError(
            "length_penalty: this reward model has no reference sample for the slope; "
            "run the reward stage again"
        )

    def score(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        scores = model.score(prompts, completions)
        if not length_penalty:
            return scores
        per_token = alpha * length_penalty * (settings.length_slope or 0.0)
        excess = [length - (settings.length_mean or 0.0) for length in model.lengths(completions)]
        return [value - per_token * tokens for value, tokens in zip(scores, excess, strict=True)]

    return RewardSource(
        score,
        mean=alpha * (settings.reward_mean or 0.0),
        std=abs(alpha) * (settings.reward_std or 1.0),
        model=model,
    )


def _reward_steps(model: RewardModel, length_penalty: float) -> RewardSource:
    if length_penalty:
        raise UserError(
            "length_penalty: it is subtracted from the reward of a whole response, but this reward model is "
            "stepwise; set it to 0"
        )
    alpha = model.settings.alpha

    def score(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[StepRewards]:
        judged = model.judge_steps(prompts, completions)
        return [StepRewards([alpha * (2 * p - 1) for p in steps.rewards], steps.ends) for steps in judged]

    return RewardSource(score, model=model)
