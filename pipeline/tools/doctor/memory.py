"""What a stage will hold in memory, reckoned from architectures alone: nothing is loaded.

The peak is what stays (weights, adapters, optimizer) and the larger of what comes and goes: a training step, or drawing answers.
"""

import re
from typing import Any, NamedTuple

from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from pipeline.models.loading import DTYPES, UNQUANTIZED
from pipeline.models.logprobs import CPU_ROWS
from pipeline.tools.doctor.meta_models import build_meta_model, saved_for_backward

# Bytes of a quantized weight, with its scales: a float for each row, or for each 64.
QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}

BUFFERS = (
    64e6  # rows, tokenizer, kernels' own: over what is reckoned 65 to 71 MB were measured, whatever the size
)

LAYER = re.compile(r"\.\d+\.")  # in the name of a weight that one of many layers holds

STATES = {
    "8bit": 2,
    "32bit": 8,
    "sgd": 0,
    "adafactor": 0,
    "": 8,
}  # optimizer bytes of a trained weight, by what its name holds


class ModelFootprint(NamedTuple):
    """A model in memory. `adapters` are how many LoRA adapters of the shape `lora` it has, of which one is trained; without `lora` all of
    it is trained, if it is `trained`. A launch that shards does so to what is trained and what is `beside` it in one module."""

    config: PreTrainedConfig
    auto: Any = AutoModelForCausalLM
    precision: str = "fp32"
    quantization: str = "none"
    lora: LoraConfig | None = None
    adapters: int = 1
    trained: bool = False
    beside: bool = False


class StepFootprint(NamedTuple):
    """A training step: micro-batches of (rows, width) tokens, and over how many of a row's tokens the output layer's logits are kept.

    `rows_at_a_time` go through the model together; `computed` is the precision.
    """

    rows: int
    width: int
    logits: int
    rows_at_a_time: int
    computed: str
    optim: str
    accumulates: bool
    checkpointing: bool
    dropout: bool = False


class GenerationFootprint(NamedTuple):
    """Answers drawn together: so many rows of at most so many tokens."""

    rows: int
    width: int
    computed: str


def estimate(
    held: list[ModelFootprint],
    step: StepFootprint | None,
    drawing: GenerationFootprint | None,
    shards: int = 1,
) -> dict[str, float]:
    """Bytes by what they hold: weights, adapters, optimizer, gradients, activations, KV cache, buffers, and the peak of them together, in
    one of the processes that hold a shard each. The first model is the one that draws."""
    found = dict.fromkeys(
        ("weights", "adapters", "optimizer", "gradients", "activations", "KV cache"), 0.0
    ) | {"buffers": BUFFERS}
    passing = [0.0]
    for each in held:
        model = build_meta_model(each.config, each.auto, DTYPES[each.precision], each.lora)
        base = {id(p): p for p in model.parameters() if each.lora is None or not p.requires_grad}
        learned = sum(p.numel() for p in model.parameters() if each.lora is not None and p.requires_grad)
        parts = shards if each.trained or each.beside else 1
        found["weights"] += weight_bytes(model, set(base), each.quantization) / parts
        found["adapters"] += 4 * learned * each.adapters / parts
        if each.trained and step:
            count = learned if each.lora else sum(p.numel() for p in base.values())
            states = next(size for name, size in STATES.items() if name in step.optim)
            found["optimizer"] += states * count / parts
            found["gradients"] += 4 * count / parts
            found["activations"], passing_step = activation_bytes(each, step, shards)
            # Activations go as gradients come, unless those of earlier micro-batches are there already.
            together = (
                found["gradients"] + found["activations"]
                if step.accumulates
                else max(found["gradients"], found["activations"])
            )
            passing.append(together + passing_step)
        if each is held[0] and drawing:
            found["KV cache"] = cache_bytes(each.config, drawing)
            gathered = (
                DTYPES[drawing.computed].itemsize * sum(p.numel() for p in base.values()) if parts > 1 else 0
            )
            passing.append(
                found["KV cache"] + 3 * 4 * drawing.rows * each.config.get_text_config().vocab_size + gathered
            )
    staying = sum(found[name] for name in ("weights", "adapters", "optimizer", "buffers"))
    return found | {"peak": staying + max(passing)}


def weight_bytes(model: nn.Module, base: set[int], quantization: str) -> float:
    """Bytes of a model's base; tied weights count once."""
    total, seen = 0.0, set[int]()
    for name, module in model.named_modules():
        whole = (
            quantization == "none"
            or not isinstance(module, nn.Linear | Conv1D)
            or any(re.fullmatch(p, name) for p in UNQUANTIZED)
        )
        for kind, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in base - seen:
                seen.add(id(parameter))
                size = parameter.element_size() if whole or kind != "weight" else QUANTIZED[quantization]
                total += size * parameter.numel()
    return total


def activation_bytes(held: ModelFootprint, step: StepFootprint, shards: int) -> tuple[float, float]:
    """(bytes that a micro-batch keeps for its backward, bytes that come and go with it)."""
    dtype = DTYPES[step.computed]
    model = build_meta_model(held.config, held.auto, dtype, held.lora)
    text = held.config.get_text_config()
    kept: float = saved_for_backward(model, step.rows, step.width, step.dropout)
    if (
        step.checkpointing
    ):  # the states between layers, and one layer made again, of the rows that go together
        states = step.rows * step.width * text.hidden_size * dtype.itemsize
        kept = (
            text.num_hidden_layers * states + kept / text.num_hidden_layers * step.rows_at_a_time / step.rows
        )
    size = dtype.itemsize * sum(p.numel() for p in model.parameters())
    if shards > 1:  # at a time what no layer holds, of the reference too, and two layers
        layers = dtype.itemsize * sum(p.numel() for name, p in model.named_parameters() if LAYER.search(name))
        kept += 2 * (size - layers) + 2 * layers / text.num_hidden_layers
    elif step.computed != held.precision and held.lora is None:  # autocast's copies of the weights
        kept += size
    logits = 4.0 * step.logits * text.vocab_size
    output = model.get_output_embeddings() if step.logits else None
    gradient = 4 * output.weight.numel() if output is not None and output.weight.requires_grad else 0
    return kept + step.rows * logits, min(step.rows, step.rows_at_a_time) * logits + gradient


def cache_bytes(config: PreTrainedConfig, drawing: GenerationFootprint) -> float:
    """Keys and values of all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (
        2
        * text.num_hidden_layers
        * heads
        * size
        * DTYPES[drawing.computed].itemsize
        * drawing.rows
        * drawing.width
    )


def rows_at_a_time(device: str, rows: int) -> int:
    """As `pipeline.models.logprobs.response_logprobs` has it."""
    return min(CPU_ROWS, rows) if device == "cpu" else rows
