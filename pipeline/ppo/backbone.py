"""One backbone: under LoRA the policy, its reference and its reward models are adapters of one base model in memory, or the bare base.

A reward model joins where it stands on the very weights that the policy stands on, in the same quantization, dtype and vocabulary; its
scores are then those of its artifact loaded alone.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, TaskType, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pipeline import models, training
from pipeline.artifact import Artifact
from pipeline.config import PPOStage
from pipeline.reward.model import RewardModel, Settings
from pipeline.reward.sources import RewardSource, from_model


def why_apart(config: PPOStage, policy: Artifact, reward: Artifact) -> str | None:
    """Why a reward model cannot stand on the policy's base; None where it can. Reads files, and no weights."""
    if config.lora is None:
        return "the policy is trained in full: only adapters share a base"
    folder, settings = _adapter(reward), Settings.load(reward.path)
    if folder is None or settings is None:
        return "it is no LoRA adapter that the reward stage wrote"
    adapter = PeftConfig.from_pretrained(str(folder))
    if more := set(adapter.modules_to_save or []) - set(models.HEADS):
        return f"it trained {', '.join(sorted(more))} as a whole"
    policy_folder = str(policy.path) if models.is_adapter(policy.path, policy.revision) else None
    if _base(reward, str(folder)) != _base(policy, policy_folder):
        return f"its base is {adapter.base_model_name_or_path}, of other content than the policy's"
    if settings.quantization != config.quantization:
        return f"its base has quantization: {settings.quantization}, the policy's {config.quantization}"
    if settings.precision != (precision := training.weight_precision(config)):
        return f"it was trained on a base in {settings.precision}, the policy's is in {precision}"
    options: dict[str, Any] = {"generates": False, "distinct_pad": False, "trust_remote_code": config.trust_remote_code}
    texts = [models.load_tokenizer(str(each.path), revision=each.revision, **options).get_vocab() for each in (reward, policy)]
    return None if texts[0] == texts[1] else "its vocabulary is another than the policy's"


def join(policy: PeftModel, reward: Artifact, name: str, length_penalty: float = 0.0, **options: Any) -> RewardSource:
    """The reward model as the adapter `name` of the policy, with its head on the policy's trunk. `options` go to `RewardModel.load`."""
    folder, settings = _adapter(reward), Settings.load(reward.path)
    assert folder, "see why_apart"
    assert settings, "see why_apart"
    weights = load_file(folder / "adapter_model.safetensors", device=str(policy.device))
    heads = {key: weights.pop(key) for key in list(weights) if key.split(".")[-2] in models.HEADS}
    adapter = PeftConfig.from_pretrained(str(folder))
    adapter.task_type, adapter.modules_to_save = TaskType.CAUSAL_LM, None  # the head is no part of a language model
    policy.add_adapter(name, adapter)
    set_peft_model_state_dict(policy, weights, adapter_name=name)
    for key, parameter in policy.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(False)
    classifier = _classifier(policy.get_base_model(), settings, heads)
    with using(policy, name):
        source = from_model(RewardModel.load(reward.path, model=classifier, **options), length_penalty)

    def score(**answers: Any) -> Sequence[float]:
        with using(policy, name):
            return source.score(**answers)

    return source._replace(score=score)


@contextmanager
def using(policy: PeftModel, adapter: str | None) -> Iterator[PeftModel]:
    """The policy with another adapter at work, or with none; what was trained goes on to be."""
    active, trained = policy.active_adapter, [parameter for parameter in policy.parameters() if parameter.requires_grad]
    try:
        if adapter is None:
            with policy.disable_adapter():
                yield policy
        else:
            policy.set_adapter(adapter)
            yield policy
    finally:  # switching adapters changes requires_grad in silence
        policy.set_adapter(active)
        policy.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _classifier(base: Any, settings: Settings, heads: dict[str, torch.Tensor]) -> Any:
    """A sequence classifier whose trunk is the language model's own."""
    config = copy.deepcopy(base.config)
    config.update(settings.head)
    with init_empty_weights():
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, base.base_model)
    for key, weight in heads.items():
        *_, module, kind = key.split(".")
        setattr(classifier.get_submodule(module), kind, torch.nn.Parameter(weight, requires_grad=False))
    return classifier


def _adapter(reward: Artifact) -> Path | None:
    """Where its adapter lies: beside the merged weights, or alone where the base is quantized."""
    folders = (reward.path / "adapter", reward.path)
    return next((folder for folder in folders if (folder / "adapter_config.json").is_file()), None)


def _base(source: Artifact, adapter: str | None) -> Any:
    """What is equal for two artifacts if and only if they stand on the same weights: their content, or a repository and its commit."""
    found = source.manifest if adapter is None else source.manifest.get("inputs", {}).get("model")
    if found is None:  # an adapter that no stage wrote
        config = PeftConfig.from_pretrained(str(adapter), revision=source.revision)
        return config.base_model_name_or_path, config.revision
    if "hub" in found:
        return found["hub"], found["revision"]
    return found["files"] if found.get("foreign") else found["identity"]
