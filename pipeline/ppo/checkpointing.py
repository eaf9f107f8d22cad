"""Gradient checkpointing of several adapters: a layer is computed again with the adapter of its forward.

Checkpointing repeats a layer's forward during the backward. If the policy and the critic are adapters of one
backbone, another one may be active by then, and the gradients would be those of neither.

PEFT has no public way to activate an adapter that leaves `requires_grad` alone and is fast enough for every
layer of every backward, so `_active_adapter` is set here, and nowhere else.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from pipeline.errors import UserError


class AdapterContexts:
    """The `context_fn` of `torch.utils.checkpoint` that keeps the adapters of a policy apart.

    It is called at each forward of a checkpointed layer, and returns one context for that forward and one for
    its repetition.
    """

    def __init__(self, policy: PeftModel):
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self.layers: list[Any] = [module for module in policy.modules() if isinstance(module, kinds)]

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Activated(self.layers, _read_active(self.layers))


class _Activated:
    """Activate an adapter in each layer; it can be entered again, as a second backward does."""

    def __init__(self, layers: list[Any], active: list[Any]):
        self.layers, self.active = layers, active
        self.before: list[Any] = []

    def __enter__(self) -> None:
        self.before = _read_active(self.layers)
        _write_active(self.layers, self.active)

    def __exit__(self, *_: Any) -> None:
        _write_active(self.layers, self.before)


def _read_active(layers: list[Any]) -> list[Any]:
    return [layer._active_adapter for layer in layers]


def _write_active(layers: list[Any], active: list[Any]) -> None:
    for layer, adapter in zip(layers, active, strict=True):
        layer._active_adapter = adapter


def checkpointing_options(policy: PeftModel, options: dict[str, Any] | None) -> dict[str, Any]:
    """Return the `gradient_checkpointing_kwargs` for a policy with a second trained adapter.

    Raises `UserError` for reentrant checkpointing, which has no contexts.
    """
    options = dict(options or {})
    if options.get("use_reentrant"):
        raise UserError(
            "ppo: training.gradient_checkpointing_kwargs.use_reentrant: true computes a layer again with "
            "whichever adapter is active by then, so critic.on: adapter would get wrong gradients; remove it"
        )
    return options | {"use_reentrant": False, "context_fn": AdapterContexts(policy)}
