"""Why a reward model cannot share the policy's backbone, as far as files tell: no weights are read."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, TaskType
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.artifacts.inputs import is_own_base
from pipeline.artifacts.manifest import Artifact, read_manifest
from pipeline.config import BASE_FREE_INITS, PPOStage
from pipeline.models.adapters import is_adapter
from pipeline.models.heads import HEAD_NAMES, head_module_names
from pipeline.models.loading import load_tokenizer
from pipeline.reward.settings import RewardSettings
from pipeline.training.arguments import build_lora_config, weight_precision

# Fields of a LoRA adapter that leave the shared base unchanged, whatever their value. All other fields must
# have PEFT's defaults.
SHAREABLE_FIELDS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}


def incompatibility(config: PPOStage, policy: Artifact, reward: Artifact) -> str | None:
    """Return why a reward model cannot share the policy's backbone, or None if it can."""
    if config.algorithm != "ppo":
        return f"algorithm: {config.algorithm} is TRL's own trainer, which keeps the policy to itself"
    if config.lora is None:
        return "the policy is trained in full: only adapters share a base"
    if config.adapter == "merge" and is_adapter(policy.path, policy.revision):
        return "adapter: merge merges the policy's adapter into its base"
    if "served" in reward.manifest:
        return f"{reward.manifest['served']['url']} serves it"

    folder, settings = adapter_folder(reward), RewardSettings.load(reward.path)
    if folder is None or settings is None or "model" not in reward.manifest.get("inputs", {}):
        return "it is no LoRA adapter that the reward stage wrote"

    adapter = PeftConfig.from_pretrained(str(folder))
    return (
        _adapter_mismatch(config, policy, adapter)
        or _base_mismatch(config, policy, reward, settings, adapter)
        or _head_mismatch(config, settings, adapter, folder)
        or _vocab_mismatch(config, policy, reward)
    )


def adapter_folder(reward: Artifact) -> Path | None:
    """Return the folder of a reward artifact's adapter, or None if it has none.

    It is beside the merged weights, or the artifact itself if the base is quantized.
    """
    folders = (reward.path / "adapter", reward.path)
    return next((folder for folder in folders if (folder / "adapter_config.json").is_file()), None)


def head_weight_names(names: Iterable[str]) -> list[str]:
    """Return which of an adapter's tensors belong to the score head, which is trained in full."""
    return [name for name in names if ".lora_" not in name]


def _policy_adapter_folder(policy: Artifact) -> str | None:
    return str(policy.path) if is_adapter(policy.path, policy.revision) else None


def _adapter_mismatch(config: PPOStage, policy: Artifact, adapter: PeftConfig) -> str | None:
    """Return why one of the two adapters cannot share its base."""
    own: PeftConfig | None
    if folder := _policy_adapter_folder(policy):
        own = PeftConfig.from_pretrained(folder, revision=policy.revision)
    else:
        own = build_lora_config(config, TaskType.CAUSAL_LM)

    for owner, lora in (("its", adapter), ("the policy's", own)):
        if setting := _modifies_base(lora):
            return f"{owner} adapter has {setting}, which an adapter on a shared base cannot have"
    return None


def _modifies_base(adapter: PeftConfig | None) -> str | None:
    """Return the setting of an adapter that changes the base, or that PEFT allows for one adapter only."""
    if not isinstance(adapter, LoraConfig):
        return f"peft_type={getattr(adapter, 'peft_type', None)}"
    if adapter.init_lora_weights not in BASE_FREE_INITS:
        return f"init_lora_weights={adapter.init_lora_weights}"

    default = LoraConfig()
    for field in dataclasses.fields(default):
        value = getattr(adapter, field.name)
        is_shareable = field.name in SHAREABLE_FIELDS | {"init_lora_weights"}
        if not is_shareable and value != getattr(default, field.name):
            return f"{field.name}={value}"
    return None


def _base_mismatch(
    config: PPOStage, policy: Artifact, reward: Artifact, settings: RewardSettings, adapter: PeftConfig
) -> str | None:
    """Return how the content, quantization or precision of the two bases differs."""
    own = _base_identity(reward, str(adapter_folder(reward)))
    if own != _base_identity(policy, _policy_adapter_folder(policy)):
        return f"its base is {adapter.base_model_name_or_path}, of other content than the policy's"
    if settings.quantization != config.quantization:
        return f"its base has quantization: {settings.quantization}, the policy's {config.quantization}"
    precision = weight_precision(config)
    if settings.precision != precision:
        return f"it was trained on a base in {settings.precision}, the policy's is in {precision}"
    return None


def _base_identity(source: Artifact, adapter: str | None) -> Any:
    """Return what is equal for two artifacts if and only if their bases have the same weights.

    It is their content, or a repository and its commit. `adapter` is the folder of the artifact's adapter, if
    it has one.
    """
    inputs = source.manifest.get("inputs", {})
    # The artifact of a PPO stage has the base of the policy that it started from.
    if adapter is not None and "model" not in inputs and "policy" in inputs:
        path = Path(inputs["policy"]["path"])
        start = Artifact(path, read_manifest(path) or inputs["policy"])
        return _base_identity(start, str(path) if (path / "adapter_config.json").is_file() else None)
    # So has that of an SFT stage which trained an adapter further.
    if adapter is not None and "model" in inputs and not is_own_base(Path(adapter), inputs["model"]["path"]):
        path = Path(inputs["model"]["path"])
        return _base_identity(Artifact(path, read_manifest(path) or inputs["model"]), str(path))

    base = source.manifest if adapter is None else inputs.get("model")
    if base is None:  # no stage wrote this adapter
        config = PeftConfig.from_pretrained(str(adapter), revision=source.revision)
        return config.base_model_name_or_path, config.revision
    if "hub" in base:
        return base["hub"], base["revision"]
    return base["files"] if base.get("foreign") else base["identity"]


def _head_mismatch(
    config: PPOStage, settings: RewardSettings, adapter: PeftConfig, folder: Path
) -> str | None:
    """Return why the classifier is not the language model's trunk plus a head in the adapter's file."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    base = AutoConfig.from_pretrained(
        str(adapter.base_model_name_or_path), revision=adapter.revision, **options
    )
    with init_empty_weights():
        policy = AutoModelForCausalLM.from_config(base, **options)
        base.update(settings.head)
        classifier = settings.auto_class.from_config(base, **options)

    trained = set(getattr(adapter, "modules_to_save", None) or [])
    # PEFT adds names of heads that this model does not have.
    if others := trained - {*HEAD_NAMES, *head_module_names(classifier)}:
        return f"it trained {', '.join(sorted(others))} in full"

    prefix = classifier.base_model_prefix
    if policy.base_model_prefix != prefix or type(policy.base_model) is not type(classifier.base_model):
        return f"a {type(classifier).__name__} has another trunk than a {type(policy).__name__}"

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        saved = {name.removeprefix("base_model.model.") for name in head_weight_names(file.keys())}
    names = [name for name, _ in classifier.named_parameters()]
    head = {name for name in names if not name.startswith(f"{prefix}.")}
    if head == saved:
        return None
    return f"its head is {', '.join(sorted(head))}, and its adapter holds {', '.join(sorted(saved))}"


def _vocab_mismatch(config: PPOStage, policy: Artifact, reward: Artifact) -> str | None:
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    policy_tokenizer = load_tokenizer(str(policy.path), revision=policy.revision, **options)
    reward_tokenizer = load_tokenizer(
        str(reward.path), generates=False, distinct_pad=False, revision=reward.revision, **options
    )
    if policy_tokenizer.get_vocab() == reward_tokenizer.get_vocab():
        return None
    return "its vocabulary is another than the policy's"
