"""Why a reward model cannot stand on the policy's backbone, as far as files tell: no weights are read."""

import dataclasses
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, TaskType
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.artifacts.manifest import Artifact, read_manifest
from pipeline.config import PPOStage
from pipeline.models.loading import HEAD_NAMES, is_adapter, load_tokenizer
from pipeline.reward.settings import RewardSettings
from pipeline.training.arguments import build_lora_config, weight_precision

# What a LoRA adapter may be told and still leave the base as it is, for all that stand on it; anything else must be left as PEFT has it.
SHAREABLE_FIELDS = {
    "task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "modules_to_save", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern",
}  # fmt: skip

BASE_FREE_INITS = (True, False, "gaussian")  # the others take what they begin with out of the base


def incompatibility(config: PPOStage, policy: Artifact, reward: Artifact) -> str | None:
    """None where they can share a base."""
    if config.algorithm != "ppo":
        return f"algorithm: {config.algorithm} is TRL's own trainer, which keeps the policy to itself"
    if config.lora is None:
        return "the policy is trained in full: only adapters share a base"
    if "served" in reward.manifest:
        return f"{reward.manifest['served']['url']} serves it"
    folder, settings = adapter_folder(reward), RewardSettings.load(reward.path)
    if folder is None or settings is None or "model" not in reward.manifest.get("inputs", {}):
        return "it is no LoRA adapter that the reward stage wrote"
    adapter = PeftConfig.from_pretrained(str(folder))
    own = str(policy.path) if is_adapter(policy.path, policy.revision) else None
    given = (
        PeftConfig.from_pretrained(own, revision=policy.revision)
        if own
        else build_lora_config(config, TaskType.CAUSAL_LM)
    )
    for whose, each in (("its", adapter), ("the policy's", given)):
        if meddling := _modifies_base(each):
            return f"{whose} adapter has {meddling}, which is not its own alone"
    if more := set(adapter.modules_to_save or []) - set(HEAD_NAMES):
        return f"it trained {', '.join(sorted(more))} as a whole"
    if _base_identity(reward, str(folder)) != _base_identity(policy, own):
        return f"its base is {adapter.base_model_name_or_path}, of other content than the policy's"
    if settings.quantization != config.quantization:
        return f"its base has quantization: {settings.quantization}, the policy's {config.quantization}"
    if settings.precision != (precision := weight_precision(config)):
        return f"it was trained on a base in {settings.precision}, the policy's is in {precision}"
    return _head_mismatch(config, settings, adapter, folder) or _vocab_mismatch(config, policy, reward)


def adapter_folder(reward: Artifact) -> Path | None:
    """Where its adapter lies: beside the merged weights, or alone where the base is quantized."""
    folders = (reward.path / "adapter", reward.path)
    return next((folder for folder in folders if (folder / "adapter_config.json").is_file()), None)


def head_weight_names(names: Any) -> list[str]:
    """Of an adapter's tensors those of the head, which is trained as a whole."""
    return [name for name in names if ".lora_" not in name]


def _modifies_base(adapter: PeftConfig | None) -> str | None:
    """What an adapter has that changes the base under the others, or that PEFT allows one adapter alone."""
    if not isinstance(adapter, LoraConfig):
        return f"peft_type={getattr(adapter, 'peft_type', None)}"
    if adapter.init_lora_weights not in BASE_FREE_INITS:
        return f"init_lora_weights={adapter.init_lora_weights}"
    plain = LoraConfig()
    for field in dataclasses.fields(plain):
        value = getattr(adapter, field.name)
        if field.name not in SHAREABLE_FIELDS | {"init_lora_weights"} and value != getattr(plain, field.name):
            return f"{field.name}={value}"
    return None


def _base_identity(source: Artifact, adapter: str | None) -> Any:
    """What is equal for two artifacts if and only if they stand on the same weights: their content, or a repository and its commit."""
    inputs = source.manifest.get("inputs", {})
    if (
        adapter is not None and "model" not in inputs and "policy" in inputs
    ):  # of a PPO stage: what its policy stands on
        path = Path(inputs["policy"]["path"])
        before = Artifact(path, read_manifest(path) or inputs["policy"])
        return _base_identity(before, str(path) if (path / "adapter_config.json").is_file() else None)
    found = source.manifest if adapter is None else inputs.get("model")
    if found is None:  # an adapter that no stage wrote
        config = PeftConfig.from_pretrained(str(adapter), revision=source.revision)
        return config.base_model_name_or_path, config.revision
    if "hub" in found:
        return found["hub"], found["revision"]
    return found["files"] if found.get("foreign") else found["identity"]


def _head_mismatch(
    config: PPOStage, settings: RewardSettings, adapter: PeftConfig, folder: Path
) -> str | None:
    """A classifier must be the language model's own trunk and a head that the adapter holds, and nothing else."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    base = AutoConfig.from_pretrained(
        str(adapter.base_model_name_or_path), revision=adapter.revision, **options
    )
    with init_empty_weights():
        policy = AutoModelForCausalLM.from_config(base, **options)
        base.update(settings.head)
        classifier = AutoModelForSequenceClassification.from_config(base, **options)
    if policy.base_model_prefix != classifier.base_model_prefix or type(policy.base_model) is not type(
        classifier.base_model
    ):
        return f"a {type(classifier).__name__} has another trunk than a {type(policy).__name__}"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        held = {name.removeprefix("base_model.model.") for name in head_weight_names(file.keys())}
    outside = {
        name
        for name, _ in classifier.named_parameters()
        if not name.startswith(f"{classifier.base_model_prefix}.")
    }
    return (
        None
        if outside == held
        else f"its head is {', '.join(sorted(outside))}, and its adapter holds {', '.join(sorted(held))}"
    )


def _vocab_mismatch(config: PPOStage, policy: Artifact, reward: Artifact) -> str | None:
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    words = load_tokenizer(str(policy.path), revision=policy.revision, **options).get_vocab()
    its = load_tokenizer(
        str(reward.path), generates=False, distinct_pad=False, revision=reward.revision, **options
    ).get_vocab()
    return None if its == words else "its vocabulary is another than the policy's"
