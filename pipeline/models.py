"""Loading and making models and tokenizers; LoRA, 8-bit and 4-bit.

In: a hub id or a folder. Out: a model ready to train and a tokenizer whose pad is not its EOS. What cannot be loaded gets one `UserError`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import find_adapter_config_file, logging

from pipeline.config import Scratch
from pipeline.errors import UserError

PAD, EOS = "<|pad|>", "<|eos|>"
# For tokenizers without a chat template: turns as they are, a user's ended by a separator.
PLAIN_TEMPLATE = (
    "{{% for m in messages %}}{{{{ m.content }}}}"
    "{{% if m.role == 'assistant' %}}{{{{ eos_token }}}}{{% else %}}{{{{ {separator!r} }}}}{{% endif %}}{{% endfor %}}"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Heads stay unquantized: they are trained, and bitsandbytes cannot train what it quantized.
HEADS = ["score", "classifier", "pre_classifier", "lm_head"]


def load_tokenizer(source: str, *, separator: str = "\n", **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with pad ≠ EOS and a chat template (turns ended by `separator` where it brings none)."""
    with _loading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.eos_token is None:
        raise UserError(f"{source}: its tokenizer has no EOS token, which marks the end of an answer; expected a decoder's tokenizer")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        spare = [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t and t != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else PAD  # a new token grows the vocabulary: see `_fit_vocabulary`
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
        with _loading(source, "LoRA adapter"):
            adapter = PeftConfig.from_pretrained(source, revision=revision)
        options |= {"quantization": quantization, "precision": precision, "revision": adapter.revision}
        base: Any = load_policy(str(adapter.base_model_name_or_path), tokenizer, **options)
        with _loading(source, "LoRA adapter"):
            return PeftModel.from_pretrained(base, source, is_trainable=trainable, revision=revision)
    with _loading(source, "causal language model"):
        model = AutoModelForCausalLM.from_pretrained(source, **_weights(quantization, precision), **options)
    return _fit_vocabulary(model, tokenizer)


def load_classifier(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quantization: str = "none",
    precision: str = "fp32",
    new_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A sequence classifier with one scalar output. A head that the checkpoint lacks is made where `new_head`, else a `UserError`."""
    with _loading(source, "sequence classifier with one output"), _expecting_a_new_head():
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, problem_type="regression", output_loading_info=True, **_weights(quantization, precision), **options
        )
    if found["missing_keys"] and not new_head:
        missing = ", ".join(sorted(found["missing_keys"]))
        raise UserError(f"{source}: has no reward head (it lacks {missing}); expected a sequence classifier, such as runs/demo/reward")
    return _fit_vocabulary(model, tokenizer)


def scratch(texts: Iterable[str], size: Scratch, separator: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """A new GPT-2 and a byte-level BPE trained on `texts`. Seed torch first."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        sorted(set(texts)),
        trainers.BpeTrainer(vocab_size=size.vocabulary, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, model_max_length=size.positions)
    tokenizer.chat_template = PLAIN_TEMPLATE.format(separator=separator)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=size.positions,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=size.heads,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model, tokenizer


def disable_dropout(model: torch.nn.Module) -> None:
    """Probability 0 in every dropout of the model and its adapters: `train()` mode then computes what `eval()` mode does."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # what a forward hands to `nn.functional.dropout`, or draws whole layers by
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def _weights(quantization: str, precision: str) -> dict[str, Any]:
    """`from_pretrained` arguments. Quantized weights compute in the chosen precision."""
    dtype = DTYPES[precision]
    if quantization == "none":
        return {"dtype": dtype}
    if quantization == "8bit":
        return {"dtype": dtype, "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)}
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=HEADS)
    return {"dtype": dtype, "quantization_config": four_bit}


def _fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
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
def _expecting_a_new_head() -> Iterator[None]:
    """No load report: that a language model brings no reward head is why one is made."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _loading(source: str, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source}: cannot be loaded as a {what}: {reason}; expected a Hugging Face folder or a hub id") from error
