"""What each stage will hold in memory: its models by their architectures, its training step, the answers it draws."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, TaskType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from pipeline.artifacts import hub
from pipeline.artifacts.files import read_json
from pipeline.artifacts.inputs import require_artifact
from pipeline.config import OBJECTIVES, EvaluateStage, PPOStage, RewardStage, SFTStage, StageConfig
from pipeline.errors import UserError
from pipeline.models.loading import is_adapter
from pipeline.models.scratch import decoder_config, encoder_config
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.ppo.policy_trainer import prompt_budget
from pipeline.ppo.stage import arguments_class, named_rewards
from pipeline.reward.settings import RewardSettings
from pipeline.tools.doctor.memory import GenerationFootprint, ModelFootprint, StepFootprint, rows_at_a_time
from pipeline.tools.doctor.meta_models import build_meta_model
from pipeline.training.arguments import (
    build_arguments,
    build_lora_config,
    resolve_precision,
    weight_precision,
)

RESPONSES_PER_ROW = {"comparisons": 2, "rankings": 4}  # of a row; rankings are demo's, where no records tell

Recipe = Mapping[str, StageConfig]  # the stages of a recipe, some of which have not been run


def plan_stage(
    config: StageConfig, recipe: Recipe, args: Any, longest: int | None
) -> tuple[list[ModelFootprint], StepFootprint | None, GenerationFootprint | None]:
    """For `memory.reckon`. `longest` are the tokens of the longest prompt there is, where records tell."""
    plans: dict[str, Any] = {"sft": _sft, "reward": _reward, "ppo": _ppo, "evaluate": _evaluate}
    held, step, drawing = plans[config.stage](config, recipe, args, longest)
    return held, step, drawing


def _sft(config: SFTStage, recipe: Recipe, args: Any, _: int | None) -> Any:
    lora = build_lora_config(config, TaskType.CAUSAL_LM)
    held = ModelFootprint(
        model_shape(config, config.model, recipe), lora=lora, trained=True, **_weight_options(config)
    )
    # TRL makes the logits in parts, so that they do not count.
    return (
        [held],
        _training_step(config, args, args.per_device_train_batch_size, config.max_length, 0, dropout=True),
        None,
    )


def _reward(config: RewardStage, recipe: Recipe, args: Any, _: int | None) -> Any:
    lora = build_lora_config(config, TaskType.SEQ_CLS)
    held = ModelFootprint(
        model_shape(config, config.model, recipe),
        AutoModelForSequenceClassification,
        lora=lora,
        trained=True,
        **_weight_options(config),
    )
    rows = args.per_device_train_batch_size * RESPONSES_PER_ROW.get(OBJECTIVES[config.objective].kind, 1)
    return [held], _training_step(config, args, rows, config.max_length, 0, dropout=True), None


def _ppo(config: PPOStage, recipe: Recipe, args: Any, longest: int | None) -> Any:
    policy, computed = model_shape(config, config.policy or "", recipe), resolve_precision(config.precision)
    lora = _policy_lora(config, recipe)
    beside = [
        given.source
        for name, given in named_rewards(config).items()
        if given.is_loaded and not _shares_backbone(config, name, recipe)
    ]
    joined = sum(given.is_loaded for given in named_rewards(config).values()) - len(beside)
    # The reference's is another where the policy goes on from one, and TRL keeps its own.
    adapters = (
        1 + joined + (lora is not None and _continues_adapter(config, recipe)) + (config.algorithm != "ppo")
    )
    held = [ModelFootprint(policy, lora=lora, adapters=adapters, trained=True, **_weight_options(config))]
    if lora is None:
        held.append(ModelFootprint(policy, beside=True))  # the reference
    held += [_scorer_footprint(config, source, recipe) for source in beside]
    tokens = args.response_tokens if config.algorithm == "ppo" else args.max_completion_length
    prompt_budget(
        build_meta_model(policy, AutoModelForCausalLM, torch.float32), tokens, config.max_prompt_tokens
    )
    rows, width = (
        args.per_device_train_batch_size,
        min(config.max_prompt_tokens, longest or config.max_prompt_tokens) + tokens,
    )
    own = config.algorithm == "ppo"
    drawn = (
        min(args.generation_batch_size, args.rollout_rows)
        if own
        else args.generation_batch_size // args.world_size
    )
    # TRL makes the logits in parts.
    return (
        held,
        _training_step(config, args, rows, width, tokens if own else 0),
        GenerationFootprint(drawn, width, computed),
    )


def _evaluate(config: EvaluateStage, recipe: Recipe, _: Any, longest: int | None) -> Any:
    computed = resolve_precision(config.precision)
    as_loaded: dict[str, Any] = {"precision": computed, "quantization": config.quantization}
    scorers = [
        config.reward or "",
        *([config.scorer.source] if config.scorer and config.scorer.is_loaded else []),
    ]
    held = [
        ModelFootprint(model_shape(config, source or "", recipe), **as_loaded)
        for source in (config.sft, config.ppo)
    ]
    held += [_scorer_footprint(config, source, recipe) for source in scorers]
    width = min(config.max_prompt_tokens, longest or config.max_prompt_tokens) + config.response_tokens
    return held, None, GenerationFootprint(config.batch_size, width, computed)


def stage_arguments(config: StageConfig) -> Any:
    """The stage's training arguments, or None for one that trains nothing."""
    import trl

    classes: dict[str, Any] = {
        "sft": lambda _: trl.SFTConfig,
        "reward": lambda _: trl.RewardConfig,
        "ppo": arguments_class,
    }
    return (
        build_arguments(config, classes[config.stage](config), Path("unused"))
        if config.stage in classes
        else None
    )  # type: ignore[arg-type]


def model_shape(config: Any, source: str, recipe: Recipe) -> PreTrainedConfig:
    """The architecture of a model by its files, or of what the stage that has not run yet will make. Raises `UserError`."""
    if source == "scratch":
        size, vocabulary = config.scratch, config.scratch.vocabulary
        made = decoder_config if size.architecture == "gpt2" else encoder_config
        return made(size, vocabulary, bos_token_id=0, eos_token_id=0)
    for stage in recipe.values():
        if source == str(stage.folder) and not Path(source).exists():
            return model_shape(
                stage, str(getattr(stage, "policy", None) or getattr(stage, "model", "")), recipe
            )
    if not hub.is_hub_id(source) and not Path(source).exists():
        raise UserError(f"{source}: does not exist, and no stage of this recipe makes it")
    beside = Path(config._recipe_folder or ".") / "config.json"
    if hub.is_hub_id(source) and not reachable_commit(source):  # else the hub's library would try for minutes
        if read_json(beside).get("_name_or_path") == source:
            return AutoConfig.from_pretrained(beside)
        raise UserError(
            f"{source}: is not on this machine, and the hub cannot be asked; put its config.json beside the recipe's files, "
            f'with "_name_or_path": {json.dumps(source)} in it'
        )
    try:
        if is_adapter(source):
            adapter = PeftConfig.from_pretrained(source)
            return model_shape(config, str(adapter.base_model_name_or_path), recipe)
        return AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: its config.json cannot be read: {' '.join(str(error).split())[:200]}"
        ) from None


@cache
def reachable_commit(hub_id: str) -> str | None:
    """The commit of a repository, where it is on this machine or the hub can be asked."""
    return hub.resolve_commit(hub_id)


def _scorer_footprint(config: Any, source: str, recipe: Recipe) -> ModelFootprint:
    """A reward model as `RewardModel.load` has it: quantized as it was trained."""
    settings, made = RewardSettings.load(Path(source)), recipe.get("reward")
    of_recipe = made.quantization if isinstance(made, RewardStage) and source == str(made.folder) else "none"
    quantization = settings.quantization if settings else of_recipe
    return ModelFootprint(
        model_shape(config, source, recipe), AutoModelForSequenceClassification, quantization=quantization
    )


def _policy_lora(config: PPOStage, recipe: Recipe) -> LoraConfig | None:
    """What PPO trains under LoRA: it goes on from SFT's adapter, where SFT has published one, or will."""
    source, sft = config.policy or "", recipe.get("sft")
    if config.lora is None or not _continues_adapter(config, recipe):
        return build_lora_config(config, TaskType.CAUSAL_LM)
    if Path(source).exists():
        found = cast(LoraConfig, PeftConfig.from_pretrained(source))
        found.inference_mode = False
        return found
    return build_lora_config(cast(SFTStage, sft), TaskType.CAUSAL_LM)


def _continues_adapter(config: PPOStage, recipe: Recipe) -> bool:
    """Whether the policy is an adapter that SFT has published, or will."""
    source, sft = config.policy or "", recipe.get("sft")
    if Path(source).exists():
        return is_adapter(source)
    return isinstance(sft, SFTStage) and source == str(sft.folder) and sft.lora is not None and not sft.merge


def _weight_options(config: Any) -> dict[str, Any]:
    return {"precision": weight_precision(config), "quantization": config.quantization}


def _training_step(
    config: Any, args: Any, rows: int, width: int, logits: int, dropout: bool = False
) -> StepFootprint:
    # TRL's trainers read a micro-batch whole.
    at_a_time = rows_at_a_time("cuda" if torch.cuda.is_available() else "cpu", rows) if logits else rows
    options: dict[str, Any] = {
        "optim": str(args.optim.value if hasattr(args.optim, "value") else args.optim),
        "dropout": dropout,
    }
    options |= {
        "accumulates": args.gradient_accumulation_steps > 1,
        "checkpointing": bool(args.gradient_checkpointing),
    }
    return StepFootprint(rows, width, logits, at_a_time, resolve_precision(config.precision), **options)


def _shares_backbone(config: PPOStage, name: str, recipe: Recipe) -> bool:
    """Whether a reward model will stand on the policy's backbone: by the artifacts, or where there are none yet by the recipe."""
    source = named_rewards(config)[name].source
    if config.one_backbone == "never" or config.lora is None or config.algorithm != "ppo":
        return False
    made = [Path(path).exists() for path in (config.policy or "", source)]
    if all(made):
        return not incompatibility(
            config,
            require_artifact(config.policy or "", "policy", ""),
            require_artifact(source, "reward", ""),
        )
    policy, reward = recipe.get("sft"), recipe.get("reward")
    own = isinstance(policy, SFTStage) and isinstance(reward, RewardStage) and source == str(reward.folder)
    same = ("model", "revision", "quantization", "precision")
    return bool(
        own
        and policy.lora
        and reward.lora
        and all(getattr(policy, key) == getattr(reward, key) for key in same)
    )  # type: ignore[union-attr]
