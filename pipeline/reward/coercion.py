"""Turn what a program passes as rewards into one `RewardSource`.

In: one reward or a list of them, as TRL's trainers take them. A wrong input raises one `UserError`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import Reward, validate
from pipeline.errors import UserError
from pipeline.models.loading import match_tokenizer
from pipeline.models.probing import unwrap
from pipeline.models.templates import settle_template
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import RewardSource, load_reward, require_reward, reward_from_model
from pipeline.reward.importing import open_function
from pipeline.reward.loading import load_reward_tokenizer
from pipeline.reward.model import RewardModel
from pipeline.reward.named import explain_reward, label_reward, name_reward
from pipeline.reward.settings import RewardSettings

REWARDS = (
    "a RewardModel, a sequence classifier, the path or hub id of one, the URL of a server, a "
    "module:function, a function or a RewardSource"
)


def sum_rewards(
    rewards: Any,
    weights: Sequence[float] | None,
    tokenizers: Any,
    policy_tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> RewardSource:
    """Return one reward, or the sum of a list of rewards, each times its weight.

    Weights are 1 by default, as in TRL. `tokenizers` are those of classifiers that are in memory: one, or a
    list with one for each reward. Models that are loaded go to `device`. Raises `UserError` for a reward of
    another kind, or another number of weights or tokenizers.
    """
    rewards = rewards if isinstance(rewards, list) else [rewards]
    if not rewards:
        raise UserError(f"ppo: reward: expected {REWARDS}, found an empty list")
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(rewards)
    _check_count("reward_processing_classes", tokenizers, len(rewards))
    for tokenizer in tokenizers:
        if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
            kind = type(tokenizer).__name__
            raise UserError(f"ppo: reward_processing_classes: expected tokenizers, found a {kind}")
    if weights is not None:
        _check_weights(weights, len(rewards))
    elif len(rewards) > 1:
        weights = [1.0] * len(rewards)
    keys = [f"reward[{i}]" if len(rewards) > 1 else "reward" for i in range(len(rewards))]
    sources = [coerce_reward(*row, device) for row in zip(keys, rewards, tokenizers, strict=True)]
    combined = combine_rewards(sources, weights, tokenizer=policy_tokenizer)
    if all((source.mean, source.std) == (0.0, 1.0) for source in sources):
        return combined._replace(mean=0.0, std=1.0)  # no reward has a reference sample, so the sum has none
    return combined


def coerce_reward(key: str, reward: Any, tokenizer: Any, device: torch.device) -> RewardSource:
    """Return one reward as a source; errors of a server or a `module:function` begin with `key`.

    Raises `UserError` if it is of another kind, or cannot be loaded.
    """
    if isinstance(reward, RewardSource) and callable(reward.score):
        return reward
    if isinstance(reward, str) and reward:
        section = validate(Reward, {"source": reward}, f"ppo: {key}")
        if section.is_function:
            return RewardSource(open_function(key, section))
        if section.is_url:
            return _open_server(key, section)
    if isinstance(reward, str | Path):
        reward = RewardModel.load(str(reward), device=device)
    elif isinstance(reward, PreTrainedModel | PeftModel):
        reward = wrap_classifier(reward, tokenizer, device)
    if isinstance(reward, RewardModel):
        return reward_from_model(reward)
    if callable(reward):
        return RewardSource(reward)
    kind = "None" if reward is None else f"a {type(reward).__name__}"
    raise UserError(f"ppo: reward: expected {REWARDS}, found {kind}")


def _open_server(key: str, section: Reward) -> RewardSource:
    label = label_reward(key, section.source)
    with explain_reward(label):
        model = load_reward(section, require_reward(section, "rlhf reward"))
    source = reward_from_model(model)
    return source._replace(score=name_reward(source.score, label), model=None)


def wrap_classifier(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, device: torch.device
) -> RewardModel:
    """Return a sequence classifier that is in memory as a `RewardModel` on `device`.

    Without a `tokenizer` it is that of the folder or hub id that the model was loaded from. Raises
    `UserError` if there is none, or if the model is of another kind.
    """
    kind, source = type(unwrap(model)).__name__, str(getattr(model, "name_or_path", ""))
    if not kind.endswith("ForSequenceClassification"):
        raise UserError(
            f"ppo: reward: expected {REWARDS}, found a {kind}; load it as an "
            "AutoModelForSequenceClassification, or pass a function that calls it"
        )
    if tokenizer is None and not source:
        raise UserError(
            f"ppo: reward: the {kind} was not loaded from a folder or the hub, so its tokenizer is unknown; "
            "pass reward_processing_classes"
        )
    if tokenizer is None:
        tokenizer = load_reward_tokenizer(source, RewardSettings.find(source))
    elif not tokenizer.chat_template:
        settle_template(tokenizer, source or kind, "\n")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    match_tokenizer(model, tokenizer)
    if getattr(model, "hf_device_map", None) is None:  # it stays where it was dispatched
        model.to(device)
    return RewardModel.load(source, model=model, tokenizer=tokenizer)


def _check_weights(weights: Any, count: int) -> None:
    if not isinstance(weights, list | tuple):
        raise UserError(f"ppo: reward_weights: expected a list of numbers, found a {type(weights).__name__}")
    _check_count("reward_weights", weights, count)
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"ppo: reward_weights: expected finite numbers, found {weight!r}")


def _check_count(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise UserError(f"ppo: {name}: expected one for each of the {count} rewards, found {len(values)}")
