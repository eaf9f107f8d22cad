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
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.artifacts.manifest import Artifact
from pipeline.errors import UserError, one_line
from pipeline.models.adapters import check_modules
from pipeline.models.load_errors import explain_adapter_errors
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

    Afterwards the adapter that was active is so again. What was trainable is so all the time.
    """
    active = policy.active_adapter
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    try:
        if adapter is None:
            with policy.disable_adapter():
                yield policy
        else:
            policy.set_adapter(adapter)
            _restore_trainable(policy, trainable)
            yield policy
    finally:
        policy.set_adapter(active)
        _restore_trainable(policy, trainable)


def _restore_trainable(policy: PeftModel, trainable: list[nn.Parameter]) -> None:
    """Undo what PEFT does to `requires_grad` when it switches adapters."""
    policy.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)


def add_trained_adapter(
    policy: PeftModel, lora: LoraConfig, name: str, weights: dict[str, Tensor] | None = None
) -> None:
    """Add an adapter that is trained beside the active one, as new or with `weights`.

    What of it is in the output layer is frozen, because only the trunk is read. Raises `UserError` if PEFT
    refuses it, or if the weights are those of an adapter of another shape.
    """
    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    where = f"ppo: {name}.lora"
    check_modules(policy.get_base_model(), lora, where)
    with explain_adapter_errors(where, lora):
        policy.add_adapter(name, lora)
    if weights is not None:
        try:
            result: Any = set_peft_model_state_dict(policy, weights, adapter_name=name)
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"ppo: {name}: its adapter is for a base of another shape: {one_line(error)}"
            ) from error
        if result.unexpected_keys:
            raise UserError(
                f"ppo: {name}: its adapter is for another base, which has {result.unexpected_keys[0]}"
            )
        if lacking := [key for key in result.missing_keys if is_of_adapter(key, name)]:
            raise UserError(f"ppo: {name}: its adapter lacks the weight {lacking[0]}; expected a whole one")

    layer = policy.get_output_embeddings()
    unread = {id(parameter) for parameter in layer.parameters()} if layer is not None else set()
    for key, parameter in policy.named_parameters():
        if is_of_adapter(key, name) and id(parameter) not in unread:
            trainable.append(parameter)
    _restore_trainable(policy, trainable)


def is_of_adapter(key: str, name: str) -> bool:
    """Return whether the parameter `key` of a policy belongs to its adapter `name`."""
    return name in key.split(".")


def _add_frozen_adapter(policy: PeftModel, folder: Path, weights: dict[str, Tensor], name: str) -> None:
    adapter = PeftConfig.from_pretrained(str(folder))
    # A language model has no score head, which is attached separately.
    adapter.task_type, adapter.modules_to_save = TaskType.CAUSAL_LM, None
    adapter.exclude_modules = None
    policy.add_adapter(name, adapter)
    result: Any = set_peft_model_state_dict(policy, weights, adapter_name=name)
    assert not result.unexpected_keys, result.unexpected_keys

    for key, parameter in policy.named_parameters():
        if is_of_adapter(key, name):
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
