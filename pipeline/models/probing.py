"""Ask a model on made-up ids: what its class or its config does not say shows in the numbers.

A question is a function of the model. Its answer is kept on the model, so that it is asked once and a copy of
the model knows it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.errors import UserError

# Largest difference between two computations of the same logits, as a fraction of their range, in fp32. In
# other precisions the mean difference counts, and the fraction is 100 times as large: a rounded router of a
# mixture of experts may send a token elsewhere.
TOLERANCE = 1e-4

# On a CPU, larger models are not asked when they are loaded: a forward takes seconds.
MAX_CPU_PARAMETERS = 2e9

ANSWERS = "_probe_answers"  # the attribute that keeps a model's answers

Answer = TypeVar("Answer")


def unwrap(model: Any) -> Any:
    """Return the model inside DistributedDataParallel and a `PeftModel`; its adapters stay active."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def can_ask(model: Any) -> bool:
    """Return whether a forward is possible and cheap enough: not on the meta device, nor of many weights."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if "meta" in devices or not devices:
        return False
    return devices != {"cpu"} or sum(p.numel() for p in model.parameters()) <= MAX_CPU_PARAMETERS


def remember(question: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """Decorate a question about the structure of a model: it is asked once, of the unwrapped model."""

    @wraps(question)
    def ask(model: Any) -> Answer:
        model = unwrap(model)
        answers = vars(model).setdefault(ANSWERS, {})
        if question.__name__ not in answers:
            answers[question.__name__] = question(model)
        return answers[question.__name__]

    return ask


def ask_once(default: Any) -> Callable[[Callable[[Any], Answer]], Callable[[Any], Answer]]:
    """Decorate a question that needs forwards: it is asked once, in `eval()` mode and without gradients.

    `default` is the answer of a model that cannot be asked now.
    """

    def decorate(question: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
        @remember
        @wraps(question)
        def evaluate(model: Any) -> Answer:
            with evaluating(model):
                return question(model)

        @wraps(question)
        def ask(model: Any) -> Answer:
            is_known = question.__name__ in vars(unwrap(model)).get(ANSWERS, {})
            return evaluate(model) if is_known or can_ask(unwrap(model)) else default

        return ask

    return decorate


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Compute in `eval()` mode, without gradients, and without autocast if the weights are in fp32."""
    device = next(model.parameters()).device.type
    autocast = torch.autocast(device, enabled=False) if is_full_precision(model) else nullcontext()
    with eval_mode(model), torch.no_grad(), autocast:
        yield


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put the model into `eval()` mode; afterwards each module has its mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_full_precision(model: Any) -> bool:
    """Return whether all weights are in fp32 or fp64, none is quantized, and a GPU does not round to TF32."""
    parameters = list(model.parameters())
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return (on_cpu or torch.get_float32_matmul_precision() == "highest") and all(
        parameter.dtype in (torch.float32, torch.float64) for parameter in parameters
    )


def differs(expected: Tensor, actual: Tensor, model: Any) -> bool:
    """Return whether logits of the model differ by more than rounding; see `TOLERANCE`.

    Logits that are not finite, as those of a diverged model, say nothing: then the result is False.
    """
    expected, actual = expected.float(), actual.float()
    if not expected.isfinite().all():
        return False
    error, spread = (expected - actual).abs(), expected.max() - expected.min()
    rounding = 1e-6 * (1 + expected.abs().max())  # equal logits have no range
    if is_full_precision(model):
        return not bool(error.max() <= TOLERANCE * spread + rounding)
    return not bool(error.mean() <= 100 * TOLERANCE * spread + 1e4 * rounding)


def made_up_ids(model: Any, *lengths: int) -> list[list[int]]:
    """Return rows of these lengths of ids from the middle of the vocabulary, where few are special tokens."""
    size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    return [
        (size // 4 + torch.randint(max(1, size // 2), (length,), generator=generator)).tolist()
        for length in lengths
    ]


def explain(error: Exception) -> str:
    """Return the error in one line. Running out of memory is raised again."""
    if isinstance(error, torch.OutOfMemoryError | UserError):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
