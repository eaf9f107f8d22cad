"""Change models in place: dropout, GELU, the layout of 4-bit weights, sparse attention, router logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

# On H100 cards torch prefers cuDNN's attention. With a mask and a width of 64 modulo 128, its gradient of the
# query is NaN if a head's log-sum-exp is low (github.com/pytorch/pytorch/issues/196678), and each new width
# costs it about 0.1 s. Flash and memory-efficient attention take its place.
torch.backends.cuda.enable_cudnn_sdp(False)

FORGETS = "_forgets_earlier_rows"  # the attribute of a model that `forget_earlier_rows` has changed


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


def forget_earlier_rows(model: torch.nn.Module) -> None:
    """Let a forward depend on its own rows alone, not on those of earlier forwards.

    After a row that is too short for sparse attention, BigBird would keep full attention for all later rows.
    After a long row, dynamic rotary positions would keep its scale for all later rows that are nearly as
    long. To call this twice changes nothing.
    """
    if getattr(model, FORGETS, False):
        return
    setattr(model, FORGETS, True)
    for module in model.modules():
        is_sparse = getattr(module, "attention_type", None) == "block_sparse"
        if is_sparse and isinstance(module, PreTrainedModel):
            module.register_forward_pre_hook(_choose_attention, with_kwargs=True)
        if "dynamic" in str(getattr(module, "rope_type", "")) and hasattr(module, "max_seq_len_cached"):
            module.register_forward_pre_hook(_reset_scale)


def _reset_scale(module: Any, _: Any) -> None:
    """Give rotary positions the scale that they had before any long row; a long row changes it again."""
    for name, frequencies in list(module.named_buffers(recurse=False)):
        prefix, is_scaled, _ = name.partition("inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if is_scaled and original is not None:
            setattr(module, name, original.clone().to(frequencies.device))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def full_attention_limit(model: Any) -> int | None:
    """Return the length up to which BigBird's sparse attention is full; None for other models."""
    config = model.config
    if getattr(config, "attention_type", None) != "block_sparse":
        return None
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def _choose_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    rows = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    length = next(row for row in rows if row is not None).shape[1]
    limit = full_attention_limit(module)
    # The new layers get the old weights. On the meta device, none are drawn for them meanwhile.
    with torch.device("meta"):
        module.set_attention_type("block_sparse" if limit and length > limit else "original_full")


@contextmanager
def without_router_logits(model: Any) -> Iterator[None]:
    """Switch the output of router logits off, and restore it at the end.

    A mixture of experts returns them for its balance loss. Only SFT reads it, and `generate` fails with it.
    """
    config = model.config.get_text_config()
    shown = getattr(config, "output_router_logits", False)
    if shown:
        config.output_router_logits = False
    try:
        yield
    finally:
        if shown:
            config.output_router_logits = True
