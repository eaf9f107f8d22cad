"""Models on the meta device: count the activations saved for backward without computing anything.

`FakeTensorMode` is private to torch; tests/tools/doctor/test_memory.py fails if it changes.
"""

from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.utils import logging

from pipeline.models.adapters import add_adapter
from pipeline.models.load_errors import explain_load_errors
from pipeline.models.patches import disable_dropout, fuse_gelu


def build_meta_model(
    config: PreTrainedConfig, auto: Any, dtype: torch.dtype, lora: LoraConfig | None = None, **options: Any
) -> Any:
    """Build a model of an architecture on the meta device.

    `auto` is the class of transformers that builds it, and `options` go to its `from_config`. Raises
    `UserError` if PEFT refuses the adapter.
    """
    is_trusted = type(config).__module__.startswith("transformers_modules")  # its code has run already
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # warns of special ids beyond a vocabulary; they are not used here
    try:
        with explain_load_errors(config._name_or_path, "model"), torch.device("meta"):
            model = auto.from_config(config, dtype=dtype, trust_remote_code=is_trusted, **options)
    finally:
        logging.set_verbosity(verbosity)
    fuse_gelu(model)
    return model if lora is None else add_adapter(model, lora)


def saved_for_backward(model: Any, rows: int, width: int, dropout: bool) -> int:
    """Return the bytes that one forward of the trunk over (rows, width) tokens saves for its backward.

    The output layer and the weights do not count.
    """
    mode = FakeTensorMode()
    saved: dict[int, Any] = {}
    if not dropout:
        disable_dropout(model)
    weights = _make_fake(model, mode)
    model.train()

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # kept alive, so that no other storage gets its address
        return tensor

    trunk = model.get_base_model().base_model if hasattr(model, "peft_config") else model.base_model
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with mode, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        trunk(input_ids=torch.zeros((rows, width), dtype=torch.long), **options)
    return sum(storage.nbytes() for storage in saved.values())


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> set[int]:
    """Replace every parameter and buffer by a tensor of `mode`, and return the addresses of their storages.

    Tied parameters stay tied.
    """
    fakes: dict[int, torch.Tensor] = {}
    with mode:
        for module in model.modules():
            stores: list[Any] = [module._parameters, module._buffers]
            for tensors in stores:
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in fakes:
                        fakes[id(tensor)] = _empty_like(tensor)
                    tensors[name] = fakes[id(tensor)]
    return {tensor.untyped_storage()._cdata for tensor in fakes.values()}


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a new tensor of the same shape, dtype and kind on the default device."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
