"""`ActorCritic`: the policy, the critic, and the frozen reference.

The critic is a value head on the last hidden states of the policy's trunk, of the backbone with an adapter of
its own, or of a model of its own (`pipeline.ppo.critic`).

In full fine-tuning the reference is a frozen copy. Under LoRA it is the same backbone: with the adapter named
`reference` if the policy started from an adapter, else the bare base.
"""

import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from pipeline.artifacts.schema import CRITIC
from pipeline.errors import UserError
from pipeline.models.logprobs import response_logprobs, response_states, scatter_to_mask
from pipeline.models.patches import disable_dropout, fuse_gelu
from pipeline.models.probes import reads_padding, state_width
from pipeline.models.truncation import Truncation
from pipeline.ppo.backbone import active_adapter, add_trained_adapter, is_of_adapter
from pipeline.ppo.checkpointing import checkpointing_options
from pipeline.ppo.critic import Critic, critic_lora
from pipeline.reward import batching
from pipeline.reward.functions import RewardSource

REFERENCE = "reference"
BUFFERS = {"kl_coef", "score_sums", "critic_warmup"}
DEFAULT = Critic()


class Outputs(NamedTuple):
    """What a forward computes, (B, T) over response tokens.

    A value is that of the state in which its token was chosen. `demonstration_logprobs` are None without
    demonstrations, and `truncated_logprobs` without a truncation.
    """

    logprobs: Tensor
    values: Tensor
    entropy: Tensor
    demonstration_logprobs: Tensor | None = None
    truncated_logprobs: Tensor | None = None


class ActorCritic(nn.Module):
    """The module that PPO trains and checkpoints.

    `policy` is a causal language model or a `PeftModel` around one. Its dropout is set to 0, so that training
    computes the log-probabilities that sampling did. `critic` is the critic that is trained beside it; its
    dropout is set to 0 too. Raises `UserError` if one of them is an encoder, or if PEFT refuses the critic's
    adapter.
    """

    kl_coef: Tensor
    score_sums: Tensor
    critic_warmup: Tensor  # only with a `critic_warmup_patience`: see `pipeline.ppo.warmup`

    def __init__(self, policy: Any, kl_coef: float, critic: Critic = DEFAULT):
        super().__init__()
        reads_padding(policy)  # asked before training, and before the copy, which keeps the answer
        self.critic_on = critic.on
        if critic.on == "adapter":
            add_trained_adapter(policy, critic_lora(policy, critic), CRITIC, critic.weights)
        disable_dropout(policy)
        fuse_gelu(policy)
        self.policy = policy
        self.reference: nn.Module | None = None
        if not isinstance(policy, PeftModel):
            self.reference = copy.deepcopy(policy).requires_grad_(False).eval()

        # The balance loss of a mixture of experts is not used here, and `generate` fails with it.
        if getattr(policy.config, "output_router_logits", False):
            policy.config.output_router_logits = False
        self.critic = prepare_trunk(critic.model) if critic.on == "model" else None
        # Accelerate reads this name: FSDP shards these layers one by one.
        self._no_split_modules = policy._no_split_modules
        if self.critic is not None:
            self._no_split_modules = set(self._no_split_modules or ()) | set(
                self.critic._no_split_modules or ()
            )

        self.value_head = nn.Linear(self._state_width(), 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if critic.value_head is not None:
            self.value_head.load_state_dict(critic.value_head)

        # Buffers are saved and resumed with the weights. `score_sums` is the number, the sum and the sum of
        # squares of all scores so far.
        self.register_buffer("kl_coef", torch.tensor(kl_coef, dtype=torch.float64))
        self.register_buffer("score_sums", torch.zeros(3, dtype=torch.float64))

    def forward(
        self,
        query_ids: Tensor,
        query_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        temperature: float,
        demonstrations: dict[str, Any] | None = None,
        critic_only: bool = False,
        truncation: Truncation | None = None,
    ) -> Outputs:
        """Return log-probabilities, values and entropies of the response tokens.

        Queries (B, P) are padded on the left, responses (B, T) on the right; masks are 1 on real tokens.
        `demonstrations` holds the same four tensors of other rows, whose log-probabilities are at temperature
        1. With `critic_only` the values send no gradient to the policy: on its trunk it stops at the head.
        With a `truncation`, log-probabilities under it are computed from the same logits.
        """
        inputs = (query_ids, query_mask, response_ids, response_mask)
        stats = response_logprobs(self.policy, *inputs, temperature, truncation)
        if self.critic_on == "trunk":
            hidden = stats.hidden.detach() if critic_only else stats.hidden
        else:
            hidden = self._critic_states(*inputs)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
        values = scatter_to_mask(values, response_mask)

        shown = response_logprobs(self.policy, **demonstrations).logprobs if demonstrations else None
        return Outputs(stats.logprobs, values, stats.entropy, shown, stats.truncated)

    def _critic_states(self, *inputs: Tensor) -> Tensor:
        """Return the (N, H) hidden states of a critic that has a trunk or an adapter of its own."""
        if self.critic is not None:
            return response_states(self.critic, *inputs)
        with active_adapter(self.policy, CRITIC):
            return response_states(self.policy.get_base_model().base_model, *inputs)

    def _state_width(self) -> int:
        """Return the size of the states that the value head reads."""
        if self.critic_on == "trunk":
            return int(self.policy.get_output_embeddings().weight.shape[-1])
        return state_width(self.policy.get_base_model().base_model if self.critic is None else self.critic)

    def critic_names(self) -> set[str]:
        """Return the names of the parameters of the value head and of the critic's adapter or trunk."""
        return {
            name
            for name, _ in self.named_parameters()
            if name.startswith(("value_head.", "critic."))
            or (self.critic_on == "adapter" and is_of_adapter(name, CRITIC))
        }

    def reference_logprobs(
        self,
        query_ids: Tensor,
        query_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        temperature: float,
    ) -> Tensor:
        """Return the (B, T) log-probabilities under the reference, at the policy's temperature.

        Call it without gradients.
        """
        inputs = (query_ids, query_mask, response_ids, response_mask, temperature)
        if self.reference is not None:
            return response_logprobs(self.reference, *inputs).logprobs
        adapter = REFERENCE if REFERENCE in self.policy.peft_config else None
        with active_adapter(self.policy, adapter) as reference:
            return response_logprobs(reference, *inputs).logprobs

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what is trained, tied weights once, and the buffers; the inputs hold all other weights."""
        return self.trainable_state(super().state_dict(*args, **kwargs))

    def trainable_state(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Keep only trainable parameters and buffers of a full state."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        names = trained | BUFFERS
        return {name: value for name, value in weights.items() if name in names}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned. Raises `KeyError` if a name of it is missing."""
        missing = set(self.state_dict()) - set(state_dict)
        if missing:
            raise KeyError(f"checkpoint lacks {sorted(missing)[0]!r} and {len(missing) - 1} more")
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys.clear()
        return result

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the policy recomputes activations in the backward."""
        return bool(self.policy.is_gradient_checkpointing)

    def gradient_checkpointing_disable(self) -> None:
        """Switch gradient checkpointing of the policy and the critic off."""
        for model in filter(None, (self.policy, self.critic)):
            model.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Switch gradient checkpointing of the policy and the critic on; the arguments go to their methods.

        Raises `UserError` if a layer would be computed again with the adapter of the other.
        """
        options = gradient_checkpointing_kwargs
        if self.critic_on == "adapter":
            options = checkpointing_options(self.policy, options)
        for model in filter(None, (self.policy, self.critic)):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)


def prepare_trunk(model: Any) -> Any:
    """Return the trunk of a model, without its output layer, ready to be trained as a critic.

    Raises `UserError` if it is an encoder.
    """
    trunk = getattr(model, "base_model", model)
    reads_padding(trunk)
    disable_dropout(trunk)
    fuse_gelu(trunk)
    return trunk.requires_grad_(True)


def value_head_from_reward(reward: RewardSource, width: int, normalization: str) -> dict[str, Tensor]:
    """Return the state of a value head that starts as the reward model's score head.

    Its values are in units of normalized scores, as `normalization` has them. `width` is the size of the
    policy's last hidden state. Raises `UserError` if the reward is not one model with a scalar head of this
    width.
    """
    model = reward.model
    head: Any = batching.score_head(model.model) if model is not None else None
    if hasattr(head, "modules_to_save"):  # the head of an adapter on a quantized base
        head = head.modules_to_save[head.active_adapter]
    if model is None or not isinstance(head, nn.Linear) or tuple(head.weight.shape) != (1, width):
        raise UserError(
            "ppo: value_init: reward needs one reward model with a scalar head on states of "
            f"{width} numbers, as the policy has; use value_init: zero"
        )

    std, mean = (reward.std, reward.mean) if normalization == "reference" else (1.0, 0.0)
    weight = model.settings.sign * model.settings.alpha * head.weight.detach().cpu().float() / std
    return {"weight": weight, "bias": torch.tensor([-mean / std])}
