"""Reward models and PPO for language models, as one stage of a larger alignment pipeline."""

import logging
import os
from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# By default, send no telemetry to the authors of libraries: the hub's client (TRL reports through it), W&B's
# crash reports, MLflow's usage data. The libraries read these variables when they are first imported, so this
# package must be imported before them. A variable that is already set is kept.
for _name, _value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)

# While it is imported on a CPU with bfloat16, bitsandbytes asks for a package that fetches code from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_EXPORTS = {
    "Critic": "pipeline.ppo.critic",
    "RewardModel": "pipeline.reward.model",
    "PPOTrainer": "pipeline.ppo.trainer",
    "PPOConfig": "pipeline.ppo.config",
    "StepRewards": "pipeline.reward.token_rewards",
    "place_rewards": "pipeline.reward.token_rewards",
}
__all__ = [
    "Critic",
    "PPOConfig",
    "PPOTrainer",
    "RewardModel",
    "StepRewards",
    "__version__",
    "place_rewards",
]


def __getattr__(name: str) -> Any:
    # PEP 562: `--help` and config errors are printed before torch is imported.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
