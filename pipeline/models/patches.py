"""Change loaded models in place: dropout off, a fused GELU, 4-bit weights in one layout."""

from typing import Any

import torch
from transformers.activations import NewGELUActivation


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability of the model and its adapters to 0.

    This includes the floats that a module passes to `nn.functional.dropout`, or uses to skip whole layers.
    `train()` mode then computes what `eval()` mode does.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in ("dropout", "layerdrop", "jitter")):
                setattr(module, name, 0.0)


def fuse_gelu(model: torch.nn.Module) -> None:
    """Replace GPT-2's tanh GELU by torch's kernel for the same function.

    The Python version of transformers takes eight passes over memory.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU with AVX512-BF16.

    A forward in `eval()` mode repacks them for a bfloat16 kernel without a backward, and leaves them so:
    after an
    evaluation, training would get no gradient through these layers (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
