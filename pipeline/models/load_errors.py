"""Errors of the libraries that load a model or build an adapter, as one line."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch
from peft import LoraConfig
from safetensors import SafetensorError

from pipeline.errors import UserError, one_line, passed_through

LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    AssertionError,
    SafetensorError,
)

CODE_IS_NOT_RUN = (
    "needs Python code that comes with it, which is not run; "
    "read that code, and if you trust it set trust_remote_code: true (in Python: trust_remote_code=True)"
)


@contextmanager
def explain_load_errors(source: str, what: str) -> Iterator[None]:
    """Turn errors of loading `source` as a `what` into a `UserError` with the whole reason.

    Running out of memory is passed on.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UnpicklingError as error:
        raise UserError(
            f"{source}: its weights are a pickle of more than tensors, which could run code and is not read; "
            "save them as safetensors"
        ) from error
    except LOAD_ERRORS as error:
        if passed_through(error, "resolve_trust_remote_code"):
            raise UserError(f"{source}: {CODE_IS_NOT_RUN}") from error
        raise UserError(
            f"{source}: cannot be loaded as a {what}: {one_line(error)}; "
            "expected a Hugging Face folder or a hub id"
        ) from error


@contextmanager
def explain_adapter_errors(where: str, lora: LoraConfig | None) -> Iterator[None]:
    """Turn what PEFT raises while it builds the adapter `lora` into a `UserError`.

    The error begins with `where`, and with the key if the reason names one. Other errors are passed on.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if lora is None or not passed_through(error, "get_peft_model"):
            raise
        reason = one_line(error)
        hint = "try lora.target_modules=all-linear" if "target" in reason.lower() else "change it"
        raise UserError(f"{where}{_named_key(lora, reason)}: {reason.rstrip('. ')}; {hint}") from error


def _named_key(lora: LoraConfig, reason: str) -> str:
    """Return `.key=value` of a key that is not PEFT's default and that the reason names, or nothing."""
    default = LoraConfig()
    for field in dataclasses.fields(LoraConfig):
        value = getattr(lora, field.name)
        if value != getattr(default, field.name) and re.search(rf"\b{field.name}\b", reason):
            return f".{field.name}={value}"
    return ""
