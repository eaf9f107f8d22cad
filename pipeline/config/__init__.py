"""Stage configs: YAML plus `key=value` overrides in, a validated, typed object out.

In: `configs/<recipe>/<stage>.yaml` and overrides such as `training.kl_coef=0.1`. Out: the stage's class.
A wrong input raises one `UserError` with the file, the key, the value and what is allowed; an unknown key is
offered the nearest name. Imports no torch, so a typo fails at once.
"""

from pipeline.config.base import BASE_FREE_INITS, PolicyStage, Scratch, StageConfig, TrainedStage
from pipeline.config.evaluate import EvaluateStage
from pipeline.config.loading import STAGES, check_run, load, validate
from pipeline.config.overrides import apply_overrides
from pipeline.config.ppo import PPOStage
from pipeline.config.prepare import PrepareStage, Source
from pipeline.config.recipes import PACKAGE, RECIPES, find_recipe, find_stage_file, recipes
from pipeline.config.reward import OBJECTIVES, FunctionSection, Reward, RewardStage
from pipeline.config.rollouts import EngineSection, RolloutsSection
from pipeline.config.runs import explain_unread, load_run
from pipeline.config.sft import SFTStage
from pipeline.config.values import nearest

__all__ = [
    "BASE_FREE_INITS",
    "OBJECTIVES",
    "PACKAGE",
    "RECIPES",
    "STAGES",
    "EngineSection",
    "EvaluateStage",
    "FunctionSection",
    "PPOStage",
    "PolicyStage",
    "PrepareStage",
    "Reward",
    "RewardStage",
    "RolloutsSection",
    "SFTStage",
    "Scratch",
    "Source",
    "StageConfig",
    "TrainedStage",
    "apply_overrides",
    "check_run",
    "explain_unread",
    "find_recipe",
    "find_stage_file",
    "load",
    "load_run",
    "nearest",
    "recipes",
    "validate",
]
