"""Who holds the weights: the policy, its value head on the same trunk, and the reference it must not leave.

In full fine-tuning the reference is a frozen copy. Under LoRA it is the same backbone: an adapter named `reference` where the policy
started from one, else the bare base.
"""

import copy
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.logprobs import response_logprobs, scatter_to_mask
from pipeline.models.patches import disable_dropout, fuse_gelu
from pipeline.ppo.backbone import active_adapter
from pipeline.reward import batching
from pipeline.reward.functions import RewardSource

REFERENCE = "reference"


class Outputs(NamedTuple):
    """All (B, T) over response tokens; the value is that of the state in which the token was chosen. `demonstrations` are the
    log-probabilities of theirs, where there were any."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor
    demonstrations: Tensor | None = None


class ActorCritic(nn.Module):
    """`policy` is a causal language model or a `PeftModel` around one. Its dropout is set to 0: training computes what sampling did."""

    def __init__(self, policy: Any, kl_coef: float):
        super().__init__()
        disable_dropout(policy)
        fuse_gelu(policy)
        self.policy = policy
        self.reference = (
            None if isinstance(policy, PeftModel) else copy.deepcopy(policy).requires_grad_(False).eval()
        )
        if getattr(policy.config, "output_router_logits", False):
            policy.config.output_router_logits = (
                False  # a mixture's balance loss, which nothing here reads and `generate` trips over
            )
        self._no_split_modules = (
            policy._no_split_modules
        )  # the layers that FSDP shards one by one: accelerate asks for them by this name
        self.value_head = nn.Linear(policy.get_output_embeddings().weight.shape[-1], 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        # Buffers, so that they are saved and resumed with the weights. Of all scores so far: number, sum, sum of squares.
        self.kl_coef: Tensor
        self.score_sums: Tensor
        self.register_buffer("kl_coef", torch.tensor(kl_coef, dtype=torch.float64))
        self.register_buffer("score_sums", torch.zeros(3, dtype=torch.float64))

    def forward(
        self, query_ids: Tensor, query_mask: Tensor, response_ids: Tensor, response_mask: Tensor, temperature: float,
        demonstrations: dict[str, Any] | None = None, value_head_only: bool = False,
    ) -> Outputs:  # fmt: skip
        """Queries (B, P) are padded on the left, responses (B, T) on the right; masks are 1 on real tokens. `demonstrations` are the same
        four of other rows, read at temperature 1. `value_head_only`: the values' gradient stops at the head."""
        found = response_logprobs(
            self.policy, query_ids, query_mask, response_ids, response_mask, temperature
        )
        hidden = found.hidden.detach() if value_head_only else found.hidden
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
        shown = response_logprobs(self.policy, **demonstrations).logprobs if demonstrations else None
        return Outputs(found.logprobs, scatter_to_mask(values, response_mask), found.entropy, shown)

    def reference_logprobs(
        self,
        query_ids: Tensor,
        query_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        temperature: float,
    ) -> Tensor:
        """Log-probabilities (B, T) of the response under the reference, at the policy's temperature. Call without gradients."""
        answers = (query_ids, query_mask, response_ids, response_mask, temperature)
        if self.reference is not None:
            return response_logprobs(self.reference, *answers).logprobs
        with active_adapter(
            self.policy, REFERENCE if REFERENCE in self.policy.peft_config else None
        ) as reference:
            return response_logprobs(reference, *answers).logprobs

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what is trained, tied weights once, and the buffers: the rest is in the inputs."""
        return self.trainable_state(super().state_dict(*args, **kwargs))

    def trainable_state(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Of a state that has everything what `state_dict` gives."""
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad} | {
            "kl_coef",
            "score_sums",
        }
        return {name: value for name, value in weights.items() if name in names}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """The counterpart of `state_dict`: every trained name must be there."""
        missing = set(self.state_dict()) - set(state_dict)
        if missing:
            raise KeyError(f"checkpoint lacks {sorted(missing)[0]!r} and {len(missing) - 1} more")
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys.clear()
        return result

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.policy.is_gradient_checkpointing)

    def gradient_checkpointing_disable(self) -> None:
        self.policy.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.policy.enable_input_require_grads()
        self.policy.gradient_checkpointing_enable(**kwargs)


def value_head_from_reward(reward: RewardSource, width: int, normalization: str) -> dict[str, Tensor]:
    """A value head that starts as the reward model's own, in units of the score that the reference sample normalises.

    Raises `UserError` where it does not fit.
    """
    scorer: Any = batching.score_head(reward.model.model) if reward.model is not None else None
    if hasattr(scorer, "modules_to_save"):  # of an adapter on a quantized base
        scorer = scorer.modules_to_save[scorer.active_adapter]
    if (
        reward.model is None
        or not isinstance(scorer, torch.nn.Linear)
        or tuple(scorer.weight.shape) != (1, width)
    ):
        raise UserError(
            f"ppo: value_init: reward needs one reward model with a scalar head on states of {width} numbers, as the policy has; "
            "use value_init: zero"
        )
    scale, centre = (reward.std, reward.mean) if normalization == "reference" else (1.0, 0.0)
    weight = (
        reward.model.settings.sign
        * reward.model.settings.alpha
        * scorer.weight.detach().cpu().float()
        / scale
    )
    return {"weight": weight, "bias": torch.tensor([-centre / scale])}
