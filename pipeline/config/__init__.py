"""Stage configs: YAML plus `key=value` overrides in, a validated, typed object out. Imports no torch, so a typo is told at once.

In: `configs/<recipe>/<stage>.yaml` and overrides such as `training.learning_rate=1e-4`. Out: one of the classes of `stages`.
A wrong input gets one `UserError`: the file, the key, the value, what is allowed and, for an unknown key, the nearest name.
"""

from pipeline.config.loading import PACKAGE, RECIPES, check_run, load, nearest, recipes, validate
from pipeline.config.stages import (
    OBJECTIVES,
    STAGES,
    EvaluateStage,
    PPOStage,
    PrepareStage,
    Reward,
    RewardStage,
    Scratch,
    SFTStage,
    Source,
    StageConfig,
    TrainedStage,
)

__all__ = [
    "OBJECTIVES",
    "PACKAGE",
    "RECIPES",
    "STAGES",
    "EvaluateStage",
    "PPOStage",
    "PrepareStage",
    "Reward",
    "RewardStage",
    "SFTStage",
    "Scratch",
    "Source",
    "StageConfig",
    "TrainedStage",
    "check_run",
    "load",
    "nearest",
    "recipes",
    "validate",
]
