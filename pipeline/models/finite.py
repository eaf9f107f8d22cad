"""Weights that are not finite (NaN or infinite): found when a model is loaded, kept and published."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.errors import UserError

Model = TypeVar("Model")


def require_finite(model: Model, source: str) -> Model:
    """Return a loaded model. Raises `UserError` if one of its weights is not finite."""
    if weight := find_nonfinite(model):
        raise UserError(
            f"{source}: its weight {weight} is not finite (NaN or infinite), so every output would be too; "
            "use another checkpoint"
        )
    return model


def find_nonfinite(model: Any, weights: dict[str, Any] | None = None) -> str | None:
    """Return the name of a parameter that is not finite, or None.

    `weights` is the full state of a sharded model; without it, this process checks its own shards. Buffers
    are not checked, because masks contain infinities.
    """
    parameters = dict(model.named_parameters())
    if weights is not None:
        parameters = {name: weights[name] for name in weights.keys() & parameters.keys()} or weights
    return next((name for name, weight in parameters.items() if not is_finite(weight)), None)


def is_finite(weight: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite. Of a sharded one, the local part is checked."""
    tensor = weight.to_local() if isinstance(weight, DTensor) else weight
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or tensor.itemsize == 1:
        return True  # has no numbers, or is quantized
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor.detach()))
