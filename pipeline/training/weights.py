"""The weights that a stage publishes: gathered if they are sharded, and finite."""

from typing import Any

from transformers import Trainer

from pipeline.distributed.sharding import full_state_dict
from pipeline.errors import UserError
from pipeline.models.finite import find_nonfinite
from pipeline.training.callbacks import REMEDY


def publishable_state(trainer: Trainer, stage: str) -> dict[str, Any] | None:
    """Return the full state on rank 0 for `save_pretrained`, or None if the weights are not sharded.

    All ranks must call it. Raises `UserError` if a weight is not finite.
    """
    state = full_state_dict(trainer)
    if weight := find_nonfinite(trainer.model, state):
        raise UserError(
            f"{stage}: step {trainer.state.global_step}: the weight {weight} is not finite; "
            f"nothing is published; {REMEDY}"
        )
    return state


def submodule_state(weights: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """Return the weights of the submodule `name`, under their names in it; None stays None."""
    if weights is None:
        return None
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
