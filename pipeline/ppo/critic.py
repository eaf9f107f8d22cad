"""`Critic`: where PPO's values are computed, what they start from, and how they are written.

A critic is a value head on hidden states: those of the policy's trunk, of the same backbone with an adapter
of its own, or of a model of its own.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.artifacts.files import hash_value, write_json
from pipeline.artifacts.schema import CRITIC, CRITIC_FILE, VALUE_HEAD
from pipeline.errors import UserError
from pipeline.training.weights import submodule_state

Place = Literal["trunk", "adapter", "model"]


class Critic(NamedTuple):
    """The critic that `PPOTrainer` trains beside the policy.

    - `on`: "trunk" is the policy's trunk; "adapter" a LoRA adapter of its own on the policy's backbone, if
      the policy is a `PeftModel`; "model" a model of its own.
    - `model`: that model; its output layer, if it has one, is not used. It has the policy's vocabulary.
    - `lora`: the arguments of the new adapter; those of the policy's adapter by default.
    - `weights`: the adapter's weights, as PEFT saves them; a new adapter by default.
    - `value_head`: `weight` (1, H) and `bias` (1,) of the head; zeros by default.
    - `learning_rate`: that of the critic's parameters; that of `PPOConfig` by default. The schedule is one.
    - `origin`: what else critic.json records.

    >>> from transformers import AutoModelForCausalLM
    >>> from pipeline import Critic
    >>> model = AutoModelForCausalLM.from_pretrained("runs/demo/sft")
    >>> critic = Critic("model", model=model, learning_rate=1e-4)
    >>> critic.on
    'model'
    """

    on: Place = "trunk"
    model: nn.Module | None = None
    lora: LoraConfig | None = None
    weights: dict[str, Tensor] | None = None
    value_head: dict[str, Tensor] | None = None
    learning_rate: float | None = None
    origin: dict[str, Any] | None = None


def critic_lora(policy: PeftModel, critic: Critic) -> LoraConfig:
    """Return the config of the critic's adapter: its own, or a copy of the policy's."""
    own: Any = policy.peft_config[str(policy.active_adapter)]
    lora: Any = copy.deepcopy(critic.lora or own)
    lora.inference_mode = False
    lora.base_model_name_or_path, lora.revision = own.base_model_name_or_path, own.revision
    return lora


def split_learning_rate(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], learning_rate: float
) -> None:
    """Move the parameters to groups with a learning rate of their own; all else of a group stays.

    Raises `UserError` if the optimizer has not all of them in its groups.
    """
    own = {id(parameter) for parameter in parameters if parameter.requires_grad}
    moved = 0
    for group in list(optimizer.param_groups):
        critic = [parameter for parameter in group["params"] if id(parameter) in own]
        if critic:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.add_param_group({**group, "params": critic, "lr": learning_rate})
            moved += len(critic)
    if moved != len(own):
        raise UserError(
            f"ppo: critic.learning_rate: a {type(optimizer).__name__} has no groups of parameters; remove "
            "it, or choose another training.optim"
        )


def write_critic(
    folder: Path, actor: Any, tokenizer: Any, origin: dict[str, Any] | None, weights: dict[str, Any] | None
) -> None:
    """Write the critic of an `ActorCritic` into `folder/critic`, beside its policy.

    There are `critic.json`, the value head, and the adapter or the model in PEFT's or transformers' own form.
    `weights` is the full state if the model is sharded.
    """
    target = folder / CRITIC
    target.mkdir(parents=True, exist_ok=True)
    if actor.critic is not None:
        actor.critic.save_pretrained(target, state_dict=submodule_state(weights, CRITIC))
    elif actor.critic_on == "adapter":  # PEFT writes an adapter to the folder of its name
        options = {"selected_adapters": [CRITIC], "save_embedding_layers": False}
        actor.policy.save_pretrained(folder, state_dict=submodule_state(weights, "policy"), **options)

    save_file(submodule_state(weights, "value_head") or actor.value_head.state_dict(), target / VALUE_HEAD)
    description = {"on": actor.critic_on, "width": actor.value_head.in_features}
    write_json(
        target / CRITIC_FILE, description | {"vocabulary": vocabulary_digest(tokenizer)} | (origin or {})
    )


def vocabulary_digest(tokenizer: Any) -> str:
    """Return what two tokenizers have in common if and only if their vocabularies are equal."""
    return hash_value(sorted(tokenizer.get_vocab().items()))
