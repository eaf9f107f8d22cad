"""Load what a `RewardModel` is made of: the classifier, and its settings if the folder has none.

An external classifier has no `reward.json`. Its encoding is then chosen by its tokenizer and its kind.
"""

import dataclasses
import json
import logging
from typing import Any

from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipeline.artifacts.schema import first_fault
from pipeline.errors import UserError
from pipeline.models.adapters import is_adapter, read_adapter
from pipeline.models.load_errors import explain_load_errors
from pipeline.models.loading import classifier_name, load_classifier, load_tokenizer
from pipeline.models.positions import max_positions, mixing_limit
from pipeline.models.probes import model_name
from pipeline.models.templates import fixed_date, is_plain
from pipeline.reward import probes
from pipeline.reward.encoding import Encoding
from pipeline.reward.settings import RewardSettings

logger = logging.getLogger(__name__)

ENCODING = TypeAdapter(Encoding)


def load_reward_tokenizer(
    source: str, settings: RewardSettings | None, **options: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a classifier; `settings` are None if it has no `reward.json`."""
    settle = settings is None or settings.encoding.turn == "template"
    return load_tokenizer(source, generates=False, distinct_pad=False, settle=settle, **options)


def load_model(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: RewardSettings | None,
    precision: str,
    options: dict[str, Any],
) -> Any:
    """Load the classifier of `source`, in `precision`; `settings` are None if it has no `reward.json`.

    Raises `UserError` if it cannot be loaded, or is a token classifier without settings.
    """
    weights: dict[str, Any] = {
        "quantization": settings.quantization if settings else "none",
        "precision": precision,
    }
    revision = options.get("revision")
    head = settings or RewardSettings()
    if not is_adapter(source, revision):
        if settings is None:
            _refuse_token_classifier(source, options)
        return load_classifier(source, tokenizer, auto_class=head.auto_class, **weights, **options)

    # Trained on a quantized base: the artifact is the adapter with the head.
    adapter = read_adapter(source, revision, head.task_type, "reward")
    options = options | {"revision": adapter.revision, "head": head.head, "auto_class": head.auto_class}
    base: Any = load_classifier(str(adapter.base_model_name_or_path), tokenizer, **weights, **options)
    with explain_load_errors(source, f"LoRA adapter of a {classifier_name(head.auto_class)} classifier"):
        return PeftModel.from_pretrained(base, source, revision=revision)


def _refuse_token_classifier(source: str, options: dict[str, Any]) -> None:
    with explain_load_errors(source, "sequence classifier"):
        names = AutoConfig.from_pretrained(source, **options).architectures or []
    if any(name.endswith("ForTokenClassification") for name in names):
        raise UserError(
            f"{source}: is a token classifier without reward.json, which says where its steps end; write one "
            'into a copy of its folder: {"objective": "stepwise", "outputs": ["wrong", "right"], "logit": 1, '
            '"output": "probability", "encoding": {"step_separator": "\\n", "max_length": 512}}'
        )


def external_settings(
    source: str, model: Any, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> RewardSettings:
    """Choose the settings of a classifier without `reward.json`.

    With several labels, `logit` is -1: none is the reward yet.
    """
    is_decoder = probes.is_decoder(model)
    if not is_decoder and tokenizer.is_fast:
        form = "pair"
    elif is_decoder and not is_plain(tokenizer):
        form = "chat"
    else:
        form = "concatenation"
    encoding = Encoding(
        form=form,
        eos=False,  # the template writes what ends a response
        max_length=_external_max_length(model, tokenizer, is_decoder),
        date=fixed_date(tokenizer) if form == "chat" else None,
        trim_pad=form == "chat" and _reads_no_pad(source, model, options),
    )
    logger.warning(
        "%s: no reward.json; using %s; to change it: RewardModel.load(…, encoding={…})",
        source or model_name(model),
        encoding,
    )
    return RewardSettings(
        objective="classification" if model.config.num_labels > 1 else "regression",
        outputs=label_names(model),
        multi_label=model.config.problem_type == "multi_label_classification",
        encoding=encoding,
        logit=0 if model.config.num_labels == 1 else -1,
    )


def _reads_no_pad(source: str, model: Any, options: dict[str, Any]) -> bool:
    """Return whether the published classifier names a pad token, before which it then takes the score."""
    config = AutoConfig.from_pretrained(source, **options) if source else model.config
    return config.pad_token_id is not None


def _external_max_length(model: Any, tokenizer: PreTrainedTokenizerBase, is_decoder: bool) -> int:
    """Return the most tokens that a classifier reads; an encoder of unknown length reads 512."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) if is_decoder else None
    if context is not None and context == mixing_limit(model):  # its scale grows with the row
        context = max(context, 512)
    return min(tokenizer.model_max_length, max_positions(model) or context or 512)


def override_settings(
    source: str,
    model: Any,
    settings: RewardSettings,
    positive_label: str | None,
    encoding: dict[str, Any] | None,
) -> RewardSettings:
    """Return a copy of the settings with the user's label and encoding. Raises `UserError`."""
    try:
        replaced = dataclasses.replace(settings.encoding, **encoding or {})
        ENCODING.validate_json(json.dumps(dataclasses.asdict(replaced), default=repr))
    except TypeError:
        known = ", ".join(field.name for field in dataclasses.fields(Encoding))
        raise UserError(f"encoding={encoding}: expected a dict with keys of {known}") from None
    except ValidationError as error:
        raise UserError(f"encoding.{first_fault(error)}") from None
    overridden = dataclasses.replace(settings, encoding=replaced)
    if positive_label is not None:
        overridden.logit = _label_index(source, model, positive_label)
    elif settings.logit < 0:
        raise UserError(
            f"{source}: has the labels {label_names(model)} and no reward.json; "
            "name the label whose logit is the reward: positive_label=…"
        )
    return overridden


def label_names(model: Any) -> list[str]:
    """Return the names of a classifier's outputs, in order."""
    return [model.config.id2label[i] for i in range(model.config.num_labels)]


def _label_index(source: str, model: Any, name: str) -> int:
    if name not in label_names(model):
        raise UserError(
            f"{source}: positive_label={name!r} is none of its labels: {', '.join(label_names(model))}"
        )
    return label_names(model).index(name)
