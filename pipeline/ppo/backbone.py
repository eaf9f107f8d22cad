"""One backbone: under LoRA, policy, reference and reward models are adapters of one model in memory.

The reference is the bare base if the policy did not start from an adapter. In fp32, and in 8-bit and 4-bit
with fp32 arithmetic, a reward model's scores are those of its artifact loaded alone. If the trunk computes in
bf16, the scores are rounded as the policy is. `pipeline.ppo.backbone_compat` decides which reward models can
share the backbone.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, TaskType, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts.manifest import Artifact
from pipeline.ppo.backbone_compat import adapter_folder, head_weight_names
from pipeline.reward.functions import RewardSource, reward_from_model
from pipeline.reward.model import RewardModel
from pipeline.reward.settings import RewardSettings


def attach_reward_adapter(
    policy: PeftModel, reward: Artifact, name: str, length_penalty: float = 0.0, **options: Any
) -> RewardSource:
    """Attach a reward model to the policy as its adapter `name`, with its head on the policy's trunk.

    The reward model must be compatible (`pipeline.ppo.backbone_compat.incompatibility`). `options` go to
    `RewardModel.load`.
    """
    folder, settings = adapter_folder(reward), RewardSettings.load(reward.path)
    assert folder is not None, "see incompatibility"
    assert settings is not None, "see incompatibility"
    weights = load_file(folder / "adapter_model.safetensors", device=str(policy.device))
    head_weights = {key: weights.pop(key) for key in head_weight_names(list(weights))}

    _add_frozen_adapter(policy, folder, weights, name)
    trust = options.get("trust_remote_code", False)
    classifier, head = _build_classifier(policy.get_base_model(), settings, head_weights, trust)
    with active_adapter(policy, name):
        model = RewardModel.load(reward.path, model=classifier, **options)
        source = reward_from_model(model, length_penalty)

    def score(**columns: Any) -> Sequence[float]:
        head.to(policy.device)  # the Trainer may have moved the policy since
        with active_adapter(policy, name):
            return source.score(**columns)

    return source._replace(score=score)


@contextmanager
def active_adapter(policy: PeftModel, adapter: str | None) -> Iterator[PeftModel]:
    """Activate another adapter of the policy, or none, for a block of code.

    Afterwards the adapter that was active is so again, and what was trainable still is.
    """
    active = policy.active_adapter
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    try:
        if adapter is None:
            with policy.disable_adapter():
                yield policy
        else:
            policy.set_adapter(adapter)
            yield policy
    finally:  # PEFT changes requires_grad when it switches adapters
        policy.set_adapter(active)
        policy.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _add_frozen_adapter(policy: PeftModel, folder: Path, weights: dict[str, Tensor], name: str) -> None:
    adapter = PeftConfig.from_pretrained(str(folder))
    # A language model has no score head, which is attached separately.
    adapter.task_type, adapter.modules_to_save = TaskType.CAUSAL_LM, None
    adapter.exclude_modules = None
    policy.add_adapter(name, adapter)
    result: Any = set_peft_model_state_dict(policy, weights, adapter_name=name)
    assert not result.unexpected_keys, result.unexpected_keys

    for key, parameter in policy.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(False)


def _build_classifier(
    base: Any, settings: RewardSettings, head_weights: dict[str, Tensor], trust_remote_code: bool
) -> tuple[Any, nn.Module]:
    """Build the classifier on the language model's own trunk; return it and its head.

    The head computes in the precision of its own weights.
    """
    config = copy.deepcopy(base.config)
    config.update(settings.head)
    with init_empty_weights():
        classifier = settings.auto_class.from_config(config, trust_remote_code=trust_remote_code)
    setattr(classifier, classifier.base_model_prefix, base.base_model)

    head = nn.ModuleList()
    for key, weight in head_weights.items():
        path, _, parameter = key.removeprefix("base_model.model.").rpartition(".")
        module = classifier.get_submodule(path)
        setattr(module, parameter, nn.Parameter(weight, requires_grad=False))
        module.register_forward_pre_hook(_cast_to_weight)
        head.append(module)
    return classifier, head


def _cast_to_weight(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(module.weight.dtype), *inputs[1:])
