"""Plan what each stage will have in memory: its models, its training step, and the responses it generates."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, TaskType
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from pipeline.artifacts import hub
from pipeline.artifacts.files import read_json
from pipeline.artifacts.inputs import require_artifact
from pipeline.config import OBJECTIVES, EvaluateStage, PPOStage, RewardStage, SFTStage, StageConfig
from pipeline.errors import UserError, one_line, passed_through
from pipeline.models.adapters import is_adapter, read_adapter
from pipeline.models.load_errors import CODE_IS_NOT_RUN
from pipeline.models.logprobs import rows_within_budget
from pipeline.models.scratch import decoder_config, encoder_config
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.ppo.critic_source import find_critic, with_critic_lora
from pipeline.ppo.policy_trainer import prompt_budget
from pipeline.ppo.stage import arguments_class, named_rewards, starting_adapter
from pipeline.reward.settings import RewardSettings
from pipeline.tools.doctor.memory import GenerationFootprint, ModelFootprint, StepFootprint, rows_per_forward
from pipeline.tools.doctor.meta_models import build_meta_model
from pipeline.training.arguments import (
    build_arguments,
    build_lora_config,
    resolve_precision,
    weight_precision,
)
from pipeline.training.policies import continued_adapter

# Responses of a record. Records of rankings differ, and may not exist yet: 4 is the number in the demo's.
RESPONSES_PER_RECORD = {"comparisons": 2, "rankings": 4}
# Two artifacts of a recipe share a backbone if these keys of their stages are equal.
BACKBONE_KEYS = ("model", "revision", "quantization", "precision")

Recipe = Mapping[str, StageConfig]  # the stages of a recipe; some of them may not have been run
Plan = tuple[list[ModelFootprint], StepFootprint | None, GenerationFootprint | None]


def plan_stage(config: StageConfig, recipe: Recipe, args: Any, longest: int | None) -> Plan:
    """Return the arguments of `memory.estimate` for a stage.

    `args` is its training arguments, and `longest` the tokens of the longest prompt, None if there are no
    records. Raises `UserError` if the architecture of a model is unknown.
    """
    plans: dict[str, Any] = {
        "sft": _plan_sft,
        "reward": _plan_reward,
        "ppo": _plan_ppo,
        "evaluate": _plan_evaluate,
    }
    models, step, generation = plans[config.stage](config, recipe, args, longest)
    return models, step, generation


def _plan_sft(config: SFTStage, recipe: Recipe, args: Any, longest: int | None) -> Plan:
    architecture = find_architecture(config, config.model, recipe)
    lora = _policy_lora(config, config.model, recipe)
    model = ModelFootprint(architecture, lora=lora, trained=True, **_weight_options(config))
    # TRL computes the logits in parts, so that they do not count.
    rows = args.per_device_train_batch_size
    return [model], _training_step(config, args, rows, config.max_length, 0, dropout=True), None


def _plan_reward(config: RewardStage, recipe: Recipe, args: Any, longest: int | None) -> Plan:
    settings = RewardSettings(objective=config.objective)
    model = ModelFootprint(
        find_architecture(config, config.model, recipe),
        settings.auto_class,
        lora=build_lora_config(config, settings.task_type),
        trained=True,
        **_weight_options(config),
    )
    responses = RESPONSES_PER_RECORD.get(OBJECTIVES[config.objective].kind, 1)
    rows = args.per_device_train_batch_size * responses
    return [model], _training_step(config, args, rows, config.max_length, 0, dropout=True), None


def _plan_ppo(config: PPOStage, recipe: Recipe, args: Any, longest: int | None) -> Plan:
    is_ppo = config.algorithm == "ppo"
    policy = find_architecture(config, config.policy or "", recipe)
    models = _ppo_models(config, recipe, policy)

    tokens = args.response_tokens if is_ppo else args.max_completion_length
    meta_policy = build_meta_model(policy, AutoModelForCausalLM, torch.float32)
    prompt_budget(meta_policy, tokens, config.max_prompt_tokens)  # raises if no prompt fits
    width = min(config.max_prompt_tokens, longest or config.max_prompt_tokens) + tokens

    # TRL computes the logits in parts, so that they do not count.
    rows, logit_tokens = args.per_device_train_batch_size, tokens if is_ppo else 0
    step = _training_step(config, args, rows, width, logit_tokens)
    if config.rollouts is not None:  # the keys and values are in the servers' memory
        generated = 0
    elif is_ppo:
        generated = min(args.generation_batch_size, args.rollout_rows)
    else:
        generated = args.generation_batch_size // args.world_size
    generation = GenerationFootprint(
        generated,
        width,
        resolve_precision(config.precision),
        read_rows=_read_rows(meta_policy, args.per_device_eval_batch_size, tokens),
        read_tokens=tokens,
        cache="fp32" if models[0].lora is None else "",  # autocast leaves what weights in fp32 compute so
    )
    return models, step, generation


def _read_rows(meta_policy: Any, rows: int, tokens: int) -> int:
    """Return how many of `rows` responses of `tokens` tokens are read together without gradients."""
    return rows_per_forward(_device(), min(rows, rows_within_budget(meta_policy, tokens)))


def _ppo_models(config: PPOStage, recipe: Recipe, policy: PreTrainedConfig) -> list[ModelFootprint]:
    """Return the policy, the reference if it is no adapter, and the rewards on other backbones."""
    if Path(config.policy or "").exists():
        starting_adapter(config)  # raises if PPO cannot start from it
    lora = _policy_lora(config, config.policy or "", recipe)
    loaded = {name: reward.source for name, reward in named_rewards(config).items() if reward.is_loaded}
    separate = [source for name, source in loaded.items() if not _shares_backbone(config, name, recipe)]
    # The reference has an adapter of its own if the policy starts from one; TRL keeps one more.
    adapters = 1 + len(loaded) - len(separate)
    continues = lora is not None and _continues_adapter(config, config.policy or "", recipe)
    adapters += continues + (config.algorithm != "ppo")

    models = [
        ModelFootprint(
            policy,
            lora=lora,
            adapters=adapters,
            critic_lora=(_critic_lora(config) or lora) if config.critic.on == "adapter" else None,
            trained=True,
            **_weight_options(config),
        )
    ]
    if lora is None:
        models.append(ModelFootprint(policy, in_trained_module=True))  # the reference
    if config.critic.on == "model":
        models.append(_critic_footprint(config, policy, recipe))
    return models + [_scorer_footprint(config, source, recipe) for source in separate]


def _critic_lora(config: PPOStage) -> LoraConfig | None:
    """Return the critic's adapter if it is another than the policy's: that of its source, or a new one."""
    saved = find_critic(Path(config.critic.source or ""))
    if config.critic.source and saved is not None:
        return read_adapter(str(saved.folder), None, TaskType.CAUSAL_LM, "critic")
    return build_lora_config(with_critic_lora(config), TaskType.CAUSAL_LM) if config.critic.lora else None


def _critic_footprint(config: PPOStage, policy: PreTrainedConfig, recipe: Recipe) -> ModelFootprint:
    """Return a critic's own model, trained in full and unquantized; by default it is the policy's."""
    architecture = policy
    if source := config.critic.source:
        saved = find_critic(Path(source))
        folder = str(saved.folder) if saved is not None and saved.on == "model" else source
        architecture = find_architecture(config, folder, recipe)
    return ModelFootprint(architecture, AutoModel, trained=True)


def _plan_evaluate(config: EvaluateStage, recipe: Recipe, args: Any, longest: int | None) -> Plan:
    precision = resolve_precision(config.precision)
    architectures = [find_architecture(config, source or "", recipe) for source in (config.sft, config.ppo)]
    models = [
        ModelFootprint(architecture, precision=precision, quantization=config.quantization)
        for architecture in architectures
    ]
    rewards = [*config.reward, *filter(None, [config.scorer])]
    models += [_scorer_footprint(config, reward.source, recipe) for reward in rewards if reward.is_loaded]
    width = min(config.max_prompt_tokens, longest or config.max_prompt_tokens) + config.response_tokens
    tokens = config.response_tokens
    meta_policy = build_meta_model(architectures[0], AutoModelForCausalLM, torch.float32)
    read_rows = _read_rows(meta_policy, config.batch_size, tokens)
    return models, None, GenerationFootprint(config.batch_size, width, precision, read_rows, tokens)


def stage_arguments(config: StageConfig) -> Any:
    """Return the stage's training arguments, or None for a stage that trains nothing."""
    import trl

    classes: dict[str, Any] = {
        "sft": lambda _: trl.SFTConfig,
        "reward": lambda _: trl.RewardConfig,
        "ppo": arguments_class,
    }
    if config.stage not in classes:
        return None
    return build_arguments(config, classes[config.stage](config), Path("unused"))  # type: ignore[arg-type]


def find_architecture(config: Any, source: str, recipe: Recipe) -> PreTrainedConfig:
    """Return the architecture of a model from its files, or of what a stage that has not run will make.

    Raises `UserError` if neither tells.
    """
    if source == "scratch":
        build = decoder_config if config.scratch.architecture == "gpt2" else encoder_config
        return build(config.scratch, config.scratch.vocabulary, bos_token_id=0, eos_token_id=0)
    for stage in recipe.values():
        if source == str(stage.folder) and not Path(source).exists():
            start = getattr(stage, "policy", None) or getattr(stage, "model", "")
            return find_architecture(stage, str(start), recipe)

    if not hub.is_hub_id(source) and not Path(source).exists():
        raise UserError(f"{source}: does not exist, and no stage of this recipe makes it")
    if hub.is_hub_id(source) and not reachable_commit(source):
        # The hub's library would retry for minutes.
        return _architecture_in_recipe(config, source)
    try:
        if is_adapter(source):
            adapter = read_adapter(source, None, None, "model")
            return find_architecture(config, str(adapter.base_model_name_or_path), recipe)
        return AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        if passed_through(error, "resolve_trust_remote_code"):
            raise UserError(f"{source}: {CODE_IS_NOT_RUN}") from None
        raise UserError(f"{source}: its config.json cannot be read: {one_line(error)}") from None


def _architecture_in_recipe(config: Any, hub_id: str) -> PreTrainedConfig:
    """Return the architecture in the config.json beside the recipe's files. Raises `UserError`."""
    file = Path(config._recipe_folder or ".") / "config.json"
    if read_json(file).get("_name_or_path") == hub_id:
        return AutoConfig.from_pretrained(file, trust_remote_code=config.trust_remote_code)
    raise UserError(
        f"{hub_id}: is not on this machine, and the hub cannot be reached; "
        "put its config.json beside the recipe's files, "
        f'with "_name_or_path": {json.dumps(hub_id)} in it'
    )


@cache
def reachable_commit(hub_id: str) -> str | None:
    """Return the commit of a repository that is on this machine or can be fetched; else None."""
    return hub.resolve_commit(hub_id)


def _scorer_footprint(config: Any, source: str, recipe: Recipe) -> ModelFootprint:
    """Return a reward model as `RewardModel.load` loads it: quantized as it was trained."""
    settings, stage = RewardSettings.load(Path(source)), recipe.get("reward")
    quantization = "none"
    if settings:
        quantization = settings.quantization
    elif isinstance(stage, RewardStage) and source == str(stage.folder):
        quantization, settings = stage.quantization, RewardSettings(objective=stage.objective)
    architecture = find_architecture(config, source, recipe)
    auto_class = (settings or RewardSettings()).auto_class
    return ModelFootprint(architecture, auto_class, quantization=quantization)


def _policy_lora(config: SFTStage | PPOStage, source: str, recipe: Recipe) -> LoraConfig | None:
    """Return the adapter that is trained: `source` if it is one or will be, else a new one, or None."""
    if Path(source).exists() and (adapter := continued_adapter(config, source)):
        return adapter
    if config.lora is None or not _continues_adapter(config, source, recipe):
        return build_lora_config(config, TaskType.CAUSAL_LM)
    return build_lora_config(cast(SFTStage, recipe.get("sft")), TaskType.CAUSAL_LM)


def _continues_adapter(config: SFTStage | PPOStage, source: str, recipe: Recipe) -> bool:
    """Return whether `source` is an adapter that is trained further, or will be one that SFT publishes."""
    sft = recipe.get("sft")
    if config.adapter == "merge":
        return False
    if Path(source).exists():
        return is_adapter(source)
    return isinstance(sft, SFTStage) and source == str(sft.folder) and sft.lora is not None and not sft.merge


def _weight_options(config: Any) -> dict[str, Any]:
    return {"precision": weight_precision(config), "quantization": config.quantization}


def _training_step(
    config: Any, args: Any, rows: int, width: int, logit_tokens: int, dropout: bool = False
) -> StepFootprint:
    return StepFootprint(
        rows=rows,
        width=width,
        logit_tokens=logit_tokens,
        # TRL's trainers put a whole micro-batch through the model.
        rows_per_forward=rows_per_forward(_device(), rows) if logit_tokens else rows,
        precision=resolve_precision(config.precision),
        optim=str(args.optim.value if hasattr(args.optim, "value") else args.optim),
        accumulates=args.gradient_accumulation_steps > 1,
        checkpointing=bool(args.gradient_checkpointing),
        dropout=dropout,
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _shares_backbone(config: PPOStage, name: str, recipe: Recipe) -> bool:
    """Return whether a reward model will be an adapter on the policy's backbone.

    The artifacts decide it if both exist, else the recipe.
    """
    source = named_rewards(config)[name].source
    if config.one_backbone == "never" or config.lora is None or config.algorithm != "ppo":
        return False
    if Path(config.policy or "").exists() and Path(source).exists():
        return not incompatibility(
            config,
            require_artifact(config.policy or "", "policy", ""),
            require_artifact(source, "reward", ""),
        )

    sft, reward = recipe.get("sft"), recipe.get("reward")
    if not (isinstance(sft, SFTStage) and isinstance(reward, RewardStage) and source == str(reward.folder)):
        return False
    is_same_base = all(getattr(sft, key) == getattr(reward, key) for key in BACKBONE_KEYS)
    return bool(sft.lora and reward.lora and is_same_base)
