"""Loading and making models and tokenizers; LoRA, 8-bit and 4-bit.

In: a hub id or a folder. Out: a model ready to train and a tokenizer whose pad is not its EOS. What cannot be loaded gets one `UserError`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file, logging

from pipeline.errors import UserError
from pipeline.models.chat import PAD, PLAIN_TEMPLATE
from pipeline.models.patches import fuse_gelu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Heads stay unquantized: they are trained, and bitsandbytes cannot train what it quantized.
HEAD_NAMES = [
    "score",
    "classifier",
    "pre_classifier",
    "pooler",
    "classification_head",
    "logits_proj",
    "sequence_summary",
    "lm_head",
]

UNQUANTIZED = [rf"(.*\.)?{name}" for name in HEAD_NAMES]  # wherever they stand in the model


def load_tokenizer(
    source: str, *, separator: str = "\n", generates: bool = True, distinct_pad: bool = True, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with a pad token and a chat template (turns ended by `separator` where it brings none).

    One that only reads (not `generates`) needs no EOS. `distinct_pad`: pad ≠ EOS, for ids that end with EOS.
    """
    with explain_load_errors(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.eos_token is None and generates:
        raise UserError(
            f"{source}: its tokenizer has no EOS token, which marks the end of an answer; expected a decoder's tokenizer"
        )
    if tokenizer.pad_token is None and not distinct_pad:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None or (distinct_pad and tokenizer.pad_token == tokenizer.eos_token):
        spare = [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t and t != tokenizer.eos_token]
        tokenizer.add_special_tokens(
            {"pad_token": spare[0] if spare else PAD}
        )  # a new one grows the vocabulary: see `_ready`
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE.format(separator=separator)
    return tokenizer


def is_adapter(source: str | Path, revision: str | None = None) -> bool:
    """Whether a folder, or a hub repository, holds an adapter and not a whole model."""
    return find_adapter_config_file(str(source), revision=revision) is not None


def load_policy(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quantization: str = "none",
    precision: str = "fp32",
    trainable: bool = False,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """A causal language model, its vocabulary as large as the tokenizer's. An adapter's folder comes back as a `PeftModel`: its base, at
    the commit that the adapter names, and the adapter, which is frozen unless `trainable`."""
    revision = options.get("revision")
    if is_adapter(source, revision):
        with explain_load_errors(source, "LoRA adapter"):
            adapter = PeftConfig.from_pretrained(source, revision=revision)
        if adapter.task_type not in (None, TaskType.CAUSAL_LM):
            raise UserError(
                f"{source}: is an adapter of task {adapter.task_type}; a policy needs one of {TaskType.CAUSAL_LM.value}"
            )
        options |= {"quantization": quantization, "precision": precision, "revision": adapter.revision}
        base: Any = load_policy(str(adapter.base_model_name_or_path), tokenizer, **options)
        with explain_load_errors(source, "LoRA adapter"):
            return PeftModel.from_pretrained(base, source, is_trainable=trainable, revision=revision)
    with explain_load_errors(source, "causal language model"):
        model = AutoModelForCausalLM.from_pretrained(source, **_weights(quantization, precision), **options)
    return _finalize(model, tokenizer)


def load_sampler(
    source: str, quantization: str = "none", precision: str = "fp32", **options: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A policy ready to sample from, on the GPU where there is one, and its tokenizer."""
    tokenizer = load_tokenizer(source, **options)
    model: Any = load_policy(source, tokenizer, quantization=quantization, precision=precision, **options)
    if quantization == "none":  # else it is where it was quantized
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer


def merge_adapter(folder: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
    """The adapter in `folder` goes to `folder/adapter`, and the whole model, in fp32, takes its place."""
    model: Any = load_policy(str(folder), tokenizer, **options)
    base = model.get_base_model()
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    if base.config.get_text_config().tie_word_embeddings and any(
        hasattr(each, "base_layer") for each in embeddings
    ):
        output = getattr(
            embeddings[1], "base_layer", embeddings[1]
        )  # what is added to one of the two is not the other's
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
        base.config.get_text_config().tie_word_embeddings = False
    merged = model.merge_and_unload()
    (folder / "adapter").mkdir()
    for file in [*folder.glob("adapter_*"), *folder.glob("README.md")]:  # the card is PEFT's, of an adapter
        file.rename(folder / "adapter" / file.name)
    merged.save_pretrained(folder)


def load_classifier(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quantization: str = "none",
    precision: str = "fp32",
    head: dict[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A sequence classifier: one to train, with a `head` (see `new_head`) that is made where the checkpoint lacks it, or, without, one
    as it was trained. Raises `UserError` where it then has no head. A policy's adapter is merged into its base first."""
    if is_adapter(source, options.get("revision")):
        if quantization != "none":
            raise UserError(
                f"{source}: is a LoRA adapter, and a quantized base takes it in only roughly; set quantization: none"
            )
        revision = options.pop("revision", None)
        with explain_load_errors(source, "LoRA adapter"):
            adapter = PeftConfig.from_pretrained(source, revision=revision)
        adapter.task_type = None  # the policy's, which asks for a model that generates
        base: Any = load_classifier(
            str(adapter.base_model_name_or_path),
            tokenizer,
            precision=precision,
            head=head,
            revision=adapter.revision,
            **options,
        )
        with explain_load_errors(source, "LoRA adapter"):
            return PeftModel.from_pretrained(
                base, source, config=adapter, revision=revision
            ).merge_and_unload()
    outputs = f" with the outputs {', '.join(head['label2id'])}" if head else ""
    with explain_load_errors(source, f"sequence classifier{outputs}"), _without_load_report():
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source, output_loading_info=True, **(head or {}), **_weights(quantization, precision), **options
        )
    if found["missing_keys"] and head is None:
        missing = ", ".join(sorted(found["missing_keys"]))
        raise UserError(
            f"{source}: has no reward head (it lacks {missing}); expected a sequence classifier, such as runs/demo/reward"
        )
    return _finalize(model, tokenizer)


def head_module_names(model: torch.nn.Module) -> list[str]:
    """The modules of a classifier that come after what was pretrained, by the last part of their names."""
    return [
        head for head in HEAD_NAMES if any(name.split(".")[-1] == head for name, _ in model.named_modules())
    ]


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a row may have where positions are learned; None where they are computed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rsplit(".", 1)[-1] in (
            "position_embeddings",
            "wpe",
            "embed_positions",
        ):
            # RoBERTa and its kin count on from the pad token's id.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - max(skipped, getattr(module, "offset", 0))  # OPT's has an offset
    return None


def head_config(outputs: Sequence[str], problem_type: str) -> dict[str, Any]:
    """What a model's config says of a head with these outputs: their names, and whether they are scalars (`regression`) or classes
    (`single_label_classification`), which `pipeline()` would squash."""
    return {
        "id2label": dict(enumerate(outputs)),
        "label2id": {name: i for i, name in enumerate(outputs)},
        "problem_type": problem_type,
    }


def _weights(quantization: str, precision: str) -> dict[str, Any]:
    """`from_pretrained` arguments. Quantized weights compute in the chosen precision."""
    dtype = DTYPES[precision]
    if quantization == "none":
        return {"dtype": dtype}
    if quantization == "8bit":
        return {
            "dtype": dtype,
            "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED),
        }
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=UNQUANTIZED,
    )
    return {"dtype": dtype, "quantization_config": four_bit}


def _finalize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """With a vocabulary as large as the tokenizer's, its special ids, and a quick GELU."""
    fuse_gelu(model)
    rows = int(model.config.get_text_config().vocab_size)
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for embedding in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            # The mean row: a random one could be a likely token.
            embedding.weight.data[rows:] = embedding.weight.data[:rows].mean(0)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """No load report: that a language model brings no reward head is why one is made."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def explain_load_errors(source: str, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise UserError(
            f"{source}: cannot be loaded as a {what}: {reason}; expected a Hugging Face folder or a hub id"
        ) from error
