"""Estimate the memory of a stage from the architectures of its models; nothing is loaded.

The peak is the permanent part (weights, adapters, optimizer) plus the largest of the temporary parts: a
training step, generation, or the reading of responses without gradients.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from pipeline.models.heads import unquantized_patterns
from pipeline.models.loading import DTYPES
from pipeline.models.logprobs import CPU_ROWS
from pipeline.models.probing import unwrap
from pipeline.tools.doctor.meta_models import build_meta_model, saved_for_backward

# Bytes of a quantized weight with its scales: a float for each row (8bit), or for each 64 weights (4bit).
QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
# Optimizer bytes of a trained weight: the first key that the name of the optimizer contains.
OPTIMIZER_BYTES = {"8bit": 2, "32bit": 8, "sgd": 0, "adafactor": 0, "": 8}
# Rows, tokenizer and buffers of kernels: 65 to 71 MB above the other parts were measured, for any model size.
BUFFERS = 64e6
# In the name of a weight that belongs to one of many layers.
LAYER = re.compile(r"\.\d+\.")
PERMANENT = ("weights", "adapters", "optimizer", "buffers")
TEMPORARY = ("gradients", "activations", "KV cache", "logits read")


class ModelFootprint(NamedTuple):
    """A model in memory.

    `adapters` is the number of its LoRA adapters of the shape `lora`, one of which is trained. A `trained`
    model without `lora` is trained in full. `critic_lora` is the shape of a second adapter that is trained,
    on states of its own. A sharded launch shards the trained model, and the models that are
    `in_trained_module` with it.
    """

    config: PreTrainedConfig
    auto: Any = AutoModelForCausalLM
    precision: str = "fp32"
    quantization: str = "none"
    lora: LoraConfig | None = None
    adapters: int = 1
    critic_lora: LoraConfig | None = None
    trained: bool = False
    in_trained_module: bool = False


class StepFootprint(NamedTuple):
    """A training step on micro-batches of (rows, width) tokens.

    `logit_tokens` is the number of tokens in a row whose logits are kept, and `rows_per_forward` the number
    of rows that go through the model together. `precision` is that of the computation.
    """

    rows: int
    width: int
    logit_tokens: int
    rows_per_forward: int
    precision: str
    optim: str
    accumulates: bool
    checkpointing: bool
    dropout: bool = False


class GenerationFootprint(NamedTuple):
    """Responses that are generated together: `rows` of at most `width` tokens, 0 if servers generate.

    They are read afterwards without gradients: the logits of `read_rows` responses of `read_tokens` tokens
    together. `cache` is the precision of the keys and values.
    """

    rows: int
    width: int
    precision: str
    read_rows: int = 0
    read_tokens: int = 0
    cache: str = ""


def estimate(
    models: list[ModelFootprint],
    step: StepFootprint | None,
    generation: GenerationFootprint | None,
    shards: int = 1,
) -> dict[str, float]:
    """Return the bytes of each part, and the `peak` of them together, in one of `shards` processes.

    The parts are `PERMANENT` and `TEMPORARY`. The first of `models` is the one that generates.
    """
    parts = dict.fromkeys((*PERMANENT, *TEMPORARY), 0.0) | {"buffers": BUFFERS}
    temporary, step_bytes = [0.0], 0.0
    for footprint in models:
        model = build_meta_model(
            footprint.config, footprint.auto, DTYPES[footprint.precision], footprint.lora
        )
        base = {id(p): p for p in model.parameters() if footprint.lora is None or not p.requires_grad}
        adapter = sum(p.numel() for p in model.parameters() if footprint.lora is not None and p.requires_grad)
        split = shards if footprint.trained or footprint.in_trained_module else 1
        parts["weights"] += weight_bytes(model, set(base), footprint.quantization) / split
        critic = critic_weights(footprint)
        parts["adapters"] += 4 * (adapter * footprint.adapters + critic) / split

        if footprint.trained and step:
            trained = adapter + critic if footprint.lora else sum(p.numel() for p in base.values())
            parts["optimizer"] += optimizer_bytes(step.optim) * trained / split
            parts["gradients"] += 4 * trained / split
            for saved, meanwhile in step_activations(footprint, step, shards):
                parts["activations"] += saved
                step_bytes += meanwhile
        if footprint is models[0] and generation:
            parts["KV cache"] = cache_bytes(footprint.config, generation)
            weights = sum(p.numel() for p in base.values())
            is_gathered = split > 1 and generation.rows
            gathered = DTYPES[generation.precision].itemsize * weights if is_gathered else 0
            logits = 3 * 4 * generation.rows * footprint.config.get_text_config().vocab_size
            temporary.append(parts["KV cache"] + logits + gathered)
            parts["logits read"] = read_bytes(footprint.config, generation)
            temporary.append(parts["logits read"] + gathered)
    if step:
        temporary.append(_step_peak(parts, step) + step_bytes)
    return parts | {"peak": sum(parts[name] for name in PERMANENT) + max(temporary)}


def _step_peak(parts: dict[str, float], step: StepFootprint) -> float:
    """Return the bytes of gradients and activations that exist at once.

    Activations are freed as gradients are computed, unless earlier micro-batches have left gradients.
    """
    gradients, activations = parts["gradients"], parts["activations"]
    return gradients + activations if step.accumulates else max(gradients, activations)


def critic_weights(footprint: ModelFootprint) -> int:
    """Return the number of weights of the critic's adapter, 0 without one."""
    if footprint.critic_lora is None:
        return 0
    model = build_meta_model(footprint.config, footprint.auto, torch.float32, footprint.critic_lora)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def step_activations(
    footprint: ModelFootprint, step: StepFootprint, shards: int
) -> Iterator[tuple[float, float]]:
    """Yield `activation_bytes` of each trained forward: of the model, and of the critic's adapter on it.

    A critic computes no logits, on an adapter or as a model of its own.
    """
    without_logits = step._replace(logit_tokens=0)
    yield activation_bytes(footprint, without_logits if footprint.auto is AutoModel else step, shards)
    if footprint.critic_lora is not None:
        critic = footprint._replace(lora=footprint.critic_lora)
        yield activation_bytes(critic, without_logits, shards)


def optimizer_bytes(optim: str) -> int:
    """Return the bytes of optimizer state for each trained weight."""
    return next(size for name, size in OPTIMIZER_BYTES.items() if name in optim)


def weight_bytes(model: nn.Module, base: set[int], quantization: str) -> float:
    """Return the bytes of the parameters whose ids are in `base`; tied weights count once."""
    total, counted = 0.0, set[int]()
    model = unwrap(model)
    whole = unquantized_patterns(model)
    for name, module in model.named_modules():
        is_whole = (
            quantization == "none"
            or not isinstance(module, nn.Linear | Conv1D)
            or any(re.fullmatch(pattern, name) for pattern in whole)
        )
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in base - counted:
                counted.add(id(parameter))
                size = parameter.element_size() if is_whole or key != "weight" else QUANTIZED[quantization]
                total += size * parameter.numel()
    return total


def activation_bytes(footprint: ModelFootprint, step: StepFootprint, shards: int) -> tuple[float, float]:
    """Return (bytes that a micro-batch saves for its backward, bytes that it needs only meanwhile)."""
    dtype = DTYPES[step.precision]
    model = build_meta_model(footprint.config, footprint.auto, dtype, footprint.lora)
    text = footprint.config.get_text_config()
    saved: float = saved_for_backward(model, step.rows, step.width, step.dropout)
    if step.checkpointing:
        # The states between layers, and one layer computed again for the rows of a forward.
        states = step.rows * step.width * text.hidden_size * dtype.itemsize
        layer = saved / text.num_hidden_layers * step.rows_per_forward / step.rows
        saved = text.num_hidden_layers * states + layer

    size = dtype.itemsize * sum(p.numel() for p in model.parameters())
    if shards > 1:
        # Gathered at once: the weights outside layers, also the reference's, and two layers.
        layers = dtype.itemsize * sum(p.numel() for name, p in model.named_parameters() if LAYER.search(name))
        saved += 2 * (size - layers) + 2 * layers / text.num_hidden_layers
    elif step.precision != footprint.precision and footprint.lora is None:
        saved += size  # autocast's copies of the weights

    logits = 4.0 * step.logit_tokens * text.vocab_size
    output = model.get_output_embeddings() if step.logit_tokens else None
    gradient = 4 * output.weight.numel() if output is not None and output.weight.requires_grad else 0
    return saved + step.rows * logits, min(step.rows, step.rows_per_forward) * logits + gradient


def cache_bytes(config: PreTrainedConfig, generation: GenerationFootprint) -> float:
    """Return the bytes of the keys and values of all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * heads * head_size
    token_bytes *= DTYPES[generation.cache or generation.precision].itemsize
    return token_bytes * generation.rows * generation.width


def read_bytes(config: PreTrainedConfig, generation: GenerationFootprint) -> float:
    """Return the bytes of the logits of responses that are read without gradients, and of an fp32 copy."""
    size = DTYPES[generation.precision].itemsize + 4
    tokens = generation.read_rows * generation.read_tokens
    return size * tokens * config.get_text_config().vocab_size


def rows_per_forward(device: str, rows: int) -> int:
    """Return how many rows `models.logprobs.response_logprobs` puts through the model together."""
    return min(CPU_ROWS, rows) if device == "cpu" else rows
