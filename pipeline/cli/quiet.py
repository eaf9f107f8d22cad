"""Filters for warnings of the libraries that a user cannot act on."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from pipeline.errors import as_line


class PrintableFormatter(logging.Formatter):
    """Log messages without what a terminal would not show as text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record, on one line."""
        return as_line(super().format(record))


def silence_libraries() -> None:
    """Hide such warnings, and show progress bars only on a terminal. Imports transformers and datasets."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    # TRL turns on checkpointing under its deprecated name, so it must be turned off under that name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated")
    # Reward models turn off broadcast_buffers under its deprecated name; the new option broadcasts once.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
    # `generate` drops a mask of ones, and then warns about the padding that it writes after EOS itself.
    _drop("transformers.modeling_utils", "strongly recommend passing in an `attention_mask`")
    # Checkpoints of the same second are ordered by their step numbers, which is correct.
    _drop("transformers.trainer_utils", "mtime may not be reliable on this filesystem")
    # Weights that are tied to the embeddings are saved once.
    _drop("transformers.trainer", "missing keys in the checkpoint model loaded: ['lm_head.weight'].")

    if logging.lastResort is not None:  # prints this package's warnings, which contain text of models
        logging.lastResort.setFormatter(PrintableFormatter())

    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_tqdm_hook(_clear_at_end)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()


def _clear_at_end(bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Make a progress bar of transformers that is cleared when it ends: each load and save has one."""
    return bar(*args, **options | {"leave": False})


def _drop(logger: str, message: str) -> None:
    """Drop the log records that contain `message`."""
    logging.getLogger(logger).addFilter(lambda record: message not in record.getMessage())
