"""Change loaded models in place: dropout off, a fused GELU."""

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
