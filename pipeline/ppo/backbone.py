"""One backbone: under LoRA the policy, its reference and its reward models are adapters of one base model in memory, or the bare base.

In fp32, 8-bit and 4-bit with fp32 arithmetic a reward model's scores are those of its artifact loaded alone; where the trunk computes in
bf16 they are rounded as the policy is. `pipeline.ppo.backbone_compat` tells which reward models can join.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, TaskType, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pipeline.artifacts.manifest import Artifact
from pipeline.ppo.backbone_compat import adapter_folder, head_weight_names
from pipeline.reward.functions import RewardSource, reward_from_model
from pipeline.reward.model import RewardModel
from pipeline.reward.settings import RewardSettings


def attach_reward_adapter(
    policy: PeftModel, reward: Artifact, name: str, length_penalty: float = 0.0, **options: Any
) -> RewardSource:
    """The reward model as the adapter `name` of the policy, with its head on the policy's trunk. `options` go to `RewardModel.load`."""
    folder, settings = adapter_folder(reward), RewardSettings.load(reward.path)
    assert folder, "see why_apart"
    assert settings, "see why_apart"
    weights = load_file(folder / "adapter_model.safetensors", device=str(policy.device))
    heads = {key: weights.pop(key) for key in head_weight_names(list(weights))}
    adapter = PeftConfig.from_pretrained(str(folder))
    adapter.task_type, adapter.modules_to_save = (
        TaskType.CAUSAL_LM,
        None,
    )  # the head is no part of a language model
    adapter.exclude_modules = None
    policy.add_adapter(name, adapter)
    found: Any = set_peft_model_state_dict(policy, weights, adapter_name=name)
    assert not found.unexpected_keys, found.unexpected_keys
    for key, parameter in policy.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(False)
    classifier, head = _build_classifier(
        policy.get_base_model(), settings, heads, options.get("trust_remote_code", False)
    )
    with active_adapter(policy, name):
        source = reward_from_model(RewardModel.load(reward.path, model=classifier, **options), length_penalty)

    def score(**answers: Any) -> Sequence[float]:
        head.to(policy.device)  # which the Trainer may have moved since
        with active_adapter(policy, name):
            return source.score(**answers)

    return source._replace(score=score)


@contextmanager
def active_adapter(policy: PeftModel, adapter: str | None) -> Iterator[PeftModel]:
    """The policy with another adapter at work, or with none; what was trained goes on to be."""
    active, trained = (
        policy.active_adapter,
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
    )
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


def _build_classifier(
    base: Any, settings: RewardSettings, heads: dict[str, torch.Tensor], trust_remote_code: bool
) -> tuple[Any, torch.nn.Module]:
    """A sequence classifier whose trunk is the language model's own, and its head, which computes in its own precision."""
    config = copy.deepcopy(base.config)
    config.update(settings.head)
    with init_empty_weights():
        classifier = AutoModelForSequenceClassification.from_config(
            config, trust_remote_code=trust_remote_code
        )
    setattr(classifier, classifier.base_model_prefix, base.base_model)
    parts = torch.nn.ModuleList()
    for key, weight in heads.items():
        path, _, kind = key.removeprefix("base_model.model.").rpartition(".")
        part = classifier.get_submodule(path)
        setattr(part, kind, torch.nn.Parameter(weight, requires_grad=False))
        part.register_forward_pre_hook(
            lambda module, inputs: (inputs[0].to(module.weight.dtype), *inputs[1:])
        )
        parts.append(part)
    return classifier, parts
