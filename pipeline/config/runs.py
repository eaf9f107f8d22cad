"""The stages of a run: those that a target needs, and those that it skips."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.config.base import StageConfig

PRODUCTS = {"prepare": "records", "reward": "reward model"}  # what a stage makes, if it is not a policy


def load_run(stages: Sequence[str], load: Callable[[str], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the configs that the last of `stages` needs, in order, and why each other stage is skipped.

    A stage is needed if a needed one reads its artifact. `load` returns the config of a stage; it is not
    called for a stage that is skipped.
    """
    configs: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for stage in reversed(stages):
        if not configs or any(config.reads(stage) for config in configs.values()):
            configs[stage] = load(stage)
        else:
            skipped[stage] = explain_unread(stage, reversed(configs.values()))
    configs = dict(reversed(configs.items()))
    _share_reward(configs)
    return configs, skipped


def explain_unread(stage: str, configs: Iterable[StageConfig]) -> str:
    """Return which keys of the configs could name the artifact of a stage, and name none of this run."""
    keys = dict.fromkeys(
        f"{config.stage}.{key}"
        for config in configs
        for key, _, declared in config.named_inputs()
        if declared.stage == stage
    )
    verb = "names" if len(keys) == 1 else "name"
    return f"{' and '.join(keys)} {verb} no {PRODUCTS.get(stage, 'policy')} of this run"


def _share_reward(configs: Mapping[str, Any]) -> None:
    """Give evaluate, if it names no reward, what PPO of the same run is trained on."""
    evaluate, ppo = configs.get("evaluate"), configs.get("ppo")
    if evaluate and ppo and not evaluate.reward:
        evaluate.reward, evaluate.uncertainty_penalty = ppo.reward, ppo.uncertainty_penalty
