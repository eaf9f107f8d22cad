"""Generation configs that `save_pretrained` refuses: repaired when the model is loaded."""

import dataclasses
import logging
import tempfile
from typing import Any

from transformers import GenerationConfig

logger = logging.getLogger(__name__)

# Flags that are read only if tokens are sampled, and only in a beam search.
SAMPLING_FLAGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
BEAM_FLAGS = ("early_stopping", "length_penalty")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def make_savable(model: Any) -> None:
    """Remove the generation settings with which `save_pretrained` fails, and name them in a warning.

    These are sampling flags without sampling, beam flags without beams, and generation settings in
    `model.config`. A generation config that is still invalid keeps the ids of its special tokens alone.
    """
    removed = _clean_model_config(model.config)
    config = getattr(model, "generation_config", None)  # a classifier has none
    if config is not None and not _is_valid(config):
        model.generation_config, names = _repair(config)
        removed += names
    if removed:
        logger.warning(
            "%s: its generation config cannot be saved; removed from it: %s",
            model.name_or_path,
            ", ".join(removed),
        )


def _is_valid(config: GenerationConfig) -> bool:
    """Return whether a generation config can be saved after a change."""
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def _repair(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """Return a generation config that can be saved, and the names of what it lost."""
    unread = [] if config.do_sample is True else [*SAMPLING_FLAGS]
    unread += BEAM_FLAGS if config.num_beams in (None, 1) else ()
    removed = [name for name in unread if getattr(config, name, None) is not None]
    for name in removed:
        setattr(config, name, None)
    if _is_valid(config):
        return config, removed

    ids = {name: getattr(config, name, None) for name in IDS}
    ids = {name: value for name, value in ids.items() if isinstance(value, list) or (value or 0) >= 0}
    lost = config.to_diff_dict().keys() - ids.keys() - {"transformers_version"}
    return GenerationConfig(**ids), removed + sorted(lost)


def _clean_model_config(config: Any) -> list[str]:
    """Unset the generation settings in a model's config if they prevent saving; return their names."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except ValueError:
            fields = {field.name for field in dataclasses.fields(config)}
            names = [
                name
                for name in GenerationConfig().to_dict()
                if name not in fields and getattr(config, name, None) is not None
            ]
            for name in names:
                setattr(config, name, None)
            return names
    return []
