"""Changes to loaded models: dropout off, a fused GELU."""

import torch
from transformers.activations import NewGELUActivation


def disable_dropout(model: torch.nn.Module) -> None:
    """Probability 0 in every dropout of the model and its adapters: `train()` mode then computes what `eval()` mode does."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(
            module
        ).items():  # what a forward hands to `nn.functional.dropout`, or draws whole layers by
            if isinstance(value, float) and any(part in name for part in ("dropout", "layerdrop", "jitter")):
                setattr(module, name, 0.0)


def fuse_gelu(model: torch.nn.Module) -> None:
    """GPT-2's tanh GELU by torch's own kernel: the same function, of which transformers' Python makes eight passes over memory."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
