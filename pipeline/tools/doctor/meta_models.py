"""Models that have shapes and no numbers: what a forward would keep for its backward is counted, and nothing is computed.

`FakeTensorMode` is private to torch; tests/doctor/test_shapes.py fails where it changes.
"""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.utils import logging

from pipeline.models.patches import disable_dropout, fuse_gelu


def build_meta_model(
    config: PreTrainedConfig, auto: Any, dtype: torch.dtype, lora: LoraConfig | None = None, **options: Any
) -> Any:
    """A model of an architecture, on the device that holds no numbers; `auto` is the transformers class that makes it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # special ids beyond a vocabulary, of which nothing is read here
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, **options)
    finally:
        logging.set_verbosity(verbosity)
    fuse_gelu(model)
    return model if lora is None else get_peft_model(model, lora)


def saved_for_backward(model: Any, rows: int, width: int, dropout: bool) -> int:
    """Bytes that one forward of the trunk over (rows, width) tokens keeps, without the output layer, weights not counted."""
    mode, own = FakeTensorMode(), set[int]()
    kept: dict[int, Any] = {}
    if not dropout:
        disable_dropout(model)
    _give_shapes(model, mode, own)
    model.train()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    trunk = model.get_base_model().base_model if hasattr(model, "peft_config") else model.base_model
    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        given = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        trunk(input_ids=torch.zeros((rows, width), dtype=torch.long), **given)
    return sum(storage.nbytes() for storage in kept.values())


def _give_shapes(model: nn.Module, mode: FakeTensorMode, own: set[int]) -> None:
    """Every parameter and buffer becomes one of `mode`, tied ones once; `own` learns where they lie."""
    made: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            stores: list[Any] = [module._parameters, module._buffers]
            for tensors in stores:
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in made:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                        made[id(tensor)] = (
                            nn.Parameter(empty, requires_grad=tensor.requires_grad)
                            if isinstance(tensor, nn.Parameter)
                            else empty
                        )
                    if tensor is not None:
                        tensors[name] = made[id(tensor)]
    own |= {tensor.untyped_storage()._cdata for tensor in made.values()}
