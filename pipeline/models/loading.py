"""Load models and tokenizers: full, LoRA, 8-bit and 4-bit.

In: a hub id or a folder. Out: a model ready to train, and a tokenizer whose pad token is not its EOS.
Raises `UserError` if either cannot be loaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, logging

from pipeline.artifacts import hub
from pipeline.errors import UserError
from pipeline.models.adapters import is_adapter, load_and_merge, read_adapter
from pipeline.models.chat import PAD
from pipeline.models.finite import require_finite
from pipeline.models.generation_config import make_savable
from pipeline.models.heads import UNQUANTIZED, find_unquantized
from pipeline.models.load_errors import explain_load_errors
from pipeline.models.patches import forget_earlier_rows, fuse_gelu, keep_4bit_layout
from pipeline.models.probes import require_decoder
from pipeline.models.templates import settle_template

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settle_trust(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of `from_pretrained` in which `trust_remote_code` is True only if it was.

    Without a value, transformers asks on the terminal whether to run the code that comes with a model.
    """
    return options | {"trust_remote_code": options.get("trust_remote_code") is True}


def load_tokenizer(
    source: str,
    *,
    separator: str = "\n",
    generates: bool = True,
    distinct_pad: bool = True,
    settle: bool = True,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `source`, with a pad token and a chat template.

    An adapter without a tokenizer has that of its base. If there is no template, it gets one in which
    `separator` ends the turns. Without `settle` a template of its own stays as it is; see
    `pipeline.models.templates`. `generates` requires an EOS; a tokenizer that only encodes needs none.
    `distinct_pad` makes the pad token differ from EOS, for ids that end with EOS. Raises `UserError` if it
    cannot be loaded, lacks the EOS, or has several templates.
    """
    tokenizer = _read_tokenizer(source, **settle_trust(options))
    if tokenizer.eos_token is None and generates:
        raise UserError(
            f"{source}: its tokenizer has no EOS token, which marks the end of a response; "
            "expected a decoder's tokenizer"
        )

    if tokenizer.pad_token is None and not distinct_pad:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None or (distinct_pad and tokenizer.pad_token == tokenizer.eos_token):
        spare = [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t and t != tokenizer.eos_token]
        # A new token grows the vocabulary; `match_tokenizer` then resizes the embeddings.
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else PAD})
    if settle or not tokenizer.chat_template:
        settle_template(tokenizer, source, separator)
    return tokenizer


def _read_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    revision = options.get("revision")
    if is_adapter(source, revision) and not hub.fetch_file(source, "tokenizer_config.json", revision):
        with explain_load_errors(source, "LoRA adapter"):
            adapter = PeftConfig.from_pretrained(source, revision=revision)
        base, options = str(adapter.base_model_name_or_path), options | {"revision": adapter.revision}
        return _read_tokenizer(base, **options)
    with explain_load_errors(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, **options)


def load_policy(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quantization: str = "none",
    precision: str = "fp32",
    trainable: bool = False,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model, with a vocabulary at least as large as the tokenizer's.

    An adapter is returned as a `PeftModel` on its base, which is loaded at the commit that the adapter names.
    The adapter is frozen unless `trainable`. Raises `UserError` if it cannot be loaded, is an encoder, or is
    an adapter for another task.
    """
    options, revision = settle_trust(options), options.get("revision")
    if is_adapter(source, revision):
        adapter = read_adapter(source, revision, TaskType.CAUSAL_LM, "policy", trained=trainable)
        options |= {"quantization": quantization, "precision": precision}
        base: Any = _load_base_of(adapter, tokenizer, **options)
        with explain_load_errors(source, "LoRA adapter"):
            if hub.fetch_file(source, GENERATION_CONFIG_NAME, revision):  # names the ends of its responses
                base.generation_config = GenerationConfig.from_pretrained(source, revision=revision or "main")
            adapted = PeftModel.from_pretrained(base, source, is_trainable=trainable, revision=revision)
        return require_finite(adapted, source)

    with explain_load_errors(source, "causal language model"):
        weights = _weight_options(quantization, precision, UNQUANTIZED)
        model = AutoModelForCausalLM.from_pretrained(source, **weights, **options)
    policy = match_tokenizer(model, tokenizer)
    require_decoder(policy, source)
    return require_finite(policy, source)


def load_merged_policy(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quantization: str = "none",
    precision: str = "fp32",
    **options: Any,
) -> PreTrainedModel:
    """Load a policy's adapter and merge it into its base, in fp32; the result is in `precision`.

    Raises `UserError` with a quantization, or if PEFT cannot merge the adapter.
    """
    _refuse_quantized_merge(source, quantization)
    revision = options.get("revision")
    adapter = read_adapter(source, revision, TaskType.CAUSAL_LM, "policy", trained=True)
    base: Any = _load_base_of(adapter, tokenizer, **options)
    # In bf16 most of what was learned would be rounded away, so only the sum is cast.
    return load_and_merge(base, source, adapter, revision).to(DTYPES[precision])  # type: ignore[arg-type]


def _load_base_of(adapter: LoraConfig, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """Load the base of an adapter, at the commit that it names; a base that is an adapter is merged."""
    source = str(adapter.base_model_name_or_path)
    load = load_merged_policy if is_adapter(source, adapter.revision) else load_policy
    return load(source, tokenizer, **options | {"revision": adapter.revision})


def _refuse_quantized_merge(source: str, quantization: str) -> None:
    if quantization != "none":
        raise UserError(
            f"{source}: is a LoRA adapter, and merging it into a quantized base loses precision; "
            "set quantization: none"
        )


def load_sampler(
    source: str, quantization: str = "none", precision: str = "fp32", **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a policy to sample from, on the GPU if there is one, and its tokenizer."""
    tokenizer = load_tokenizer(source, **options)
    model: Any = load_policy(source, tokenizer, quantization=quantization, precision=precision, **options)
    if quantization == "none":  # a quantized model stays on the device where it was quantized
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


def merge_adapter(folder: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
    """Replace the adapter in `folder` by the merged model in fp32; the adapter moves to `folder/adapter`."""
    merged: Any = load_merged_policy(str(folder), tokenizer, **options)
    (folder / "adapter").mkdir()
    # The README is PEFT's model card, which describes the adapter.
    for file in [*folder.glob("adapter_*"), *folder.glob("README.md")]:
        file.rename(folder / "adapter" / file.name)
    merged.save_pretrained(folder)


def load_classifier(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quantization: str = "none",
    precision: str = "fp32",
    head: dict[str, Any] | None = None,
    auto_class: Any = AutoModelForSequenceClassification,
    **options: Any,
) -> PreTrainedModel:
    """Load a sequence classifier, or another `auto_class`; a policy's adapter is merged into its base first.

    With `head` (see `head_config`) it is one to train, and a head that the checkpoint lacks is randomly
    initialized. Without, it is used as trained. Raises `UserError` if the checkpoint then has no head.
    """
    options = settle_trust(options)
    if is_adapter(source, options.get("revision")):
        _refuse_quantized_merge(source, quantization)
        options |= {"precision": precision, "head": head, "auto_class": auto_class}
        return _load_merged_classifier(source, tokenizer, **options)

    what = f"{classifier_name(auto_class)} classifier"
    outputs = f" with the outputs {', '.join(head['label2id'])}" if head else ""
    with explain_load_errors(source, f"{what}{outputs}"), _without_load_report():
        unquantized = [] if quantization == "none" else find_unquantized(source, auto_class, **options)
        weights = _weight_options(quantization, precision, unquantized)
        model, loading_info = auto_class.from_pretrained(
            source, output_loading_info=True, **(head or {}), **weights, **options
        )

    if loading_info["missing_keys"] and head is None:
        missing = ", ".join(sorted(loading_info["missing_keys"]))
        raise UserError(
            f"{source}: has no reward head (it lacks {missing}); expected a {what}, such as runs/demo/reward"
        )
    return require_finite(match_tokenizer(model, tokenizer), source)


def classifier_name(auto_class: Any) -> str:
    """Return what a class of classifiers classifies: `sequence` or `token`."""
    return "sequence" if auto_class is AutoModelForSequenceClassification else "token"


def _load_merged_classifier(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str | None = None,
    precision: str = "fp32",
    **options: Any,
) -> PreTrainedModel:
    """Load the base of a policy's adapter as a classifier, and merge the adapter into it, in fp32."""
    adapter = read_adapter(source, revision, None, "model to start from", trained=True)
    adapter.task_type = None  # that of the policy requires a model that generates
    base = load_classifier(
        str(adapter.base_model_name_or_path), tokenizer, revision=adapter.revision, **options
    )
    return load_and_merge(base, source, adapter, revision).to(DTYPES[precision])  # type: ignore[arg-type]


def load_trunk(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: str = "fp32",
    head: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Load a decoder without its output layer, from a language model, a classifier or such a decoder.

    An adapter is merged into its base first, in fp32; `head` (see `head_config`) is that of a classifier's.
    The vocabulary is at least as large as the tokenizer's. Raises `UserError` if it cannot be loaded, lacks
    weights or is an encoder.
    """
    options = settle_trust(options)
    if is_adapter(source, options.get("revision")):
        load: Any = load_merged_policy if head is None else partial(load_classifier, head=head)
        return load(source, tokenizer, precision=precision, **options).base_model

    with explain_load_errors(source, "decoder"), _without_load_report():
        model, loading_info = AutoModel.from_pretrained(
            source, output_loading_info=True, dtype=DTYPES[precision], **options
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise UserError(f"{source}: lacks the weight {missing[0]}; expected a decoder's whole weights")
    trunk = match_tokenizer(model, tokenizer)
    require_decoder(trunk, source)
    return require_finite(trunk, source)


def head_config(outputs: Sequence[str], problem_type: str) -> dict[str, Any]:
    """Return the fields of a model's config that describe a head with these outputs.

    `problem_type` is `regression` for scalars, or `single_label_classification` for classes, whose logits
    `transformers.pipeline()` would pass through a softmax or sigmoid.
    """
    return {
        "id2label": dict(enumerate(outputs)),
        "label2id": {name: i for i, name in enumerate(outputs)},
        "problem_type": problem_type,
    }


def _weight_options(quantization: str, precision: str, unquantized: list[str]) -> dict[str, Any]:
    """Return the `from_pretrained` arguments; quantized weights compute in the given precision.

    `unquantized` are patterns for the names of heads: they are trained, and bitsandbytes cannot train
    quantized weights.
    """
    dtype = DTYPES[precision]
    if quantization == "none":
        return {"dtype": dtype}
    if quantization == "8bit":
        eight_bit = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=unquantized)
        return {"dtype": dtype, "quantization_config": eight_bit}

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=unquantized,
    )
    return {"dtype": dtype, "quantization_config": four_bit}


def match_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Patch the model, grow its vocabulary to the tokenizer's, and set the pad and EOS ids; return it."""
    fuse_gelu(model)
    keep_4bit_layout(model)
    forget_earlier_rows(model)
    config = model.config.get_text_config()
    rows = int(config.vocab_size)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for embedding in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            # New rows are the mean row, because a random one could be a likely token.
            embedding.weight.data[rows:] = embedding.weight.data[:rows].mean(0)

    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    make_savable(model)
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence the load report of transformers, since a language model is expected to lack a reward head."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
