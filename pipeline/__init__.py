"""Reward models and PPO for language models, as one stage of a larger alignment pipeline."""

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The libraries read it when they are first imported; set it to 0 to let them report.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_EXPORTS = {"RewardModel": "pipeline.reward.model", "PPOTrainer": "pipeline.ppo.trainer", "PPOConfig": "pipeline.ppo.config"}
__all__ = ["PPOConfig", "PPOTrainer", "RewardModel", "__version__"]


def __getattr__(name: str) -> Any:
    # PEP 562: `--help` and config errors come before torch is imported.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
