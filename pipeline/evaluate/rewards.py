"""The reward that evaluate compares policies by: a model, a server, a function, or a sum of these."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage, Reward, validate
from pipeline.config.reward import as_rewards, name_rewards
from pipeline.evaluate.sampling import map_samples, score_columns
from pipeline.formatting.numbers import format_number
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import (
    RewardSource,
    load_reward,
    require_reward,
    reward_from_model,
)
from pipeline.reward.importing import open_function
from pipeline.reward.model import DistributedRewardModel, RewardModel
from pipeline.reward.named import explain_reward, label_reward
from pipeline.reward.parts import read_rewards, restore_scale
from pipeline.reward.references import record_keys
from pipeline.reward.shaping import score_references, shape_source, split_referring

# (columns of samples, prompts) -> the column `reward`, and `rewards/NAME` for each part of a sum
Scorer = Callable[[dict[str, list[Any]], Dataset], dict[str, list[float]]]


def complete_reward(config: EvaluateStage) -> EvaluateStage:
    """Return the config with a reward: if it names none, what the run's PPO was trained on.

    Raises `UserError` if PPO has not run.
    """
    if config.reward:
        return config
    ppo = require_artifact(config.upstream("ppo"), "policy", config.make_command("ppo"))
    trained = ppo.manifest.get("fingerprint", {}).get("config", {})
    sections = as_rewards(trained.get("reward") or config.upstream("reward"))
    rewards = [validate(Reward, section, f"{ppo.path}: reward") for section in sections]
    names = [row["name"] for row in read_rewards(ppo.path)]  # a name is no part of the fingerprint
    if len(names) == len(rewards):
        rewards = [
            reward.model_copy(update={"name": name}) for reward, name in zip(rewards, names, strict=True)
        ]
    penalty = trained.get("uncertainty_penalty", 0.0)
    return config.model_copy(update={"reward": rewards, "uncertainty_penalty": penalty})


def named_rewards(config: EvaluateStage) -> dict[str, Reward]:
    """Return the rewards by their names as inputs: `reward` if there is one, else with their numbers."""
    if len(config.reward) == 1:
        return {"reward": config.reward[0]}
    return {f"reward_{number}": reward for number, reward in enumerate(config.reward)}


def reward_key(config: EvaluateStage, name: str) -> str:
    """Return the key of the config behind a reward's name as an input, such as `reward[1]`."""
    return f"reward[{name.removeprefix('reward_')}]" if len(config.reward) > 1 else "reward"


def check_functions(config: EvaluateStage) -> None:
    """Raise `UserError` if a reward that is a function cannot be opened."""
    for name, reward in named_rewards(config).items():
        if reward.is_function:
            open_function(reward_key(config, name), reward)


def open_rewards(config: EvaluateStage) -> dict[str, Artifact]:
    """Open the rewards that are models or servers, by their names as inputs. Raises `UserError`."""
    opened = {}
    for name, reward in named_rewards(config).items():
        if not reward.is_function:
            with explain_reward(label_reward(reward_key(config, name), reward.source)):
                command = config.make_command("reward")
                opened[name] = require_reward(reward, command, config.trust_remote_code)
    return opened


def load_rewards(
    config: EvaluateStage, inputs: dict[str, Artifact]
) -> tuple[Scorer, dict[str, RewardModel], list[RewardSource]]:
    """Return the reward of samples, the reward models in it by their names as inputs, and its parts.

    A model alone scores as `RewardModel.score` does, and has no parts. Others are combined as PPO combines
    them. Raises `UserError` for running statistics that PPO's artifact does not have.
    """
    rewards = named_rewards(config)
    is_alone = len(rewards) == 1 and not any(
        r.length_penalty or r.weight is not None or r.is_shaped for r in rewards.values()
    )
    models = {
        name: _load_model(config, reward, inputs[name], is_alone)
        for name, reward in rewards.items()
        if not reward.is_function
    }
    if is_alone and models:
        (model,) = models.values()
        return lambda columns, _: {"reward": model.score(columns["prompt"], columns["text"])}, models, []

    sources = [
        reward_from_model(models[name], reward.length_penalty)
        if name in models
        else RewardSource(open_function(reward_key(config, name), reward))
        for name, reward in rewards.items()
    ]
    parts = [
        shape_source(source, reward, label_reward(reward_key(config, name), reward.source), logged)
        for source, (name, reward), logged in zip(
            sources, rewards.items(), name_rewards(config.reward), strict=True
        )
    ]
    # A folder `best/` or `policies/step-N/` of the run's own artifact has no parts.
    scales = [row for ppo in (config.ppo, config.upstream("ppo")) for row in read_rewards(Path(ppo or ""))]
    for part, (name, reward) in zip(parts, rewards.items(), strict=True):
        restore_scale(part, reward, scales, label_reward(reward_key(config, name), reward.source))
    weights = [reward.weight for reward in rewards.values() if reward.weight is not None]
    combined = combine_rewards(parts, weights or None, config.uncertainty_penalty)
    names = [f"rewards/{part.name}" for part in parts if combined.parts]
    return lambda columns, prompts: score_columns(combined.score, columns, prompts, names), models, parts


def count_references(config: EvaluateStage) -> int:
    """Return how many reference responses to each prompt the rewards need."""
    return max((reward.references for reward in config.reward if reward.transform == "sigmoid"), default=0)


def add_references(parts: Sequence[RewardSource], columns: dict[str, list[Any]], prompts: Dataset) -> None:
    """Score SFT's reference responses to each of `prompts`, the rows of `columns` in order, for the parts."""
    referring, references = split_referring(parts)
    table = map_samples(partial(score_references, referring), columns, prompts)
    repeats, records = len(table) // len(prompts), prompts[:]
    for number, key in enumerate(record_keys(records.pop("prompt"), records)):
        by_source = zip(*table[number * repeats : (number + 1) * repeats], strict=True)
        for scores, values in zip(references, by_source, strict=True):
            scores.scores[key] = list(values)[: scores.count]


def _load_model(config: EvaluateStage, reward: Reward, opened: Artifact, is_alone: bool) -> RewardModel:
    label = reward.positive_label or config.positive_label
    code: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if is_alone and reward.is_loaded:  # each process scores its share
        return DistributedRewardModel.load(
            opened.path, revision=opened.revision, positive_label=label, **code
        )
    return load_reward(reward.model_copy(update={"positive_label": label}), opened, **code)


def describe_rewards(config: EvaluateStage) -> str:
    """Return the sum of the rewards as text, such as `0.5 × a:f + 0.5 × b:g`."""
    if len(config.reward) == 1 and config.reward[0].weight is None:
        return _describe_reward(config.reward[0])
    share = 1 / len(config.reward)
    terms = [
        f"{format_number(share if reward.weight is None else reward.weight)} × {_describe_reward(reward)}"
        for reward in config.reward
    ]
    penalty = config.uncertainty_penalty
    less = f", less {format_number(penalty)} standard deviations between them" if penalty else ""
    return " + ".join(terms) + less


def _describe_reward(reward: Reward) -> str:
    """Return the source of a reward, and how it is changed before its weight."""
    shapes = ["normalized"] if reward.normalize != "none" else []
    shapes += [f"clipped to ±{format_number(reward.clip)}"] if reward.clip is not None else []
    shapes += [f"σ against {reward.references} of SFT's responses"] if reward.transform != "none" else []
    return f"{reward.source} ({', '.join(shapes)})" if shapes else reward.source
