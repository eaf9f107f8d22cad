"""Loading and making models and tokenizers; LoRA, 8-bit and 4-bit.

In: a hub id or a folder. Out: a model ready to train and a tokenizer whose pad is not its EOS. What cannot be loaded gets one `UserError`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation
from transformers.utils import find_adapter_config_file, logging

from pipeline.config import Scratch
from pipeline.errors import UserError

PAD, EOS = "<|pad|>", "<|eos|>"
CLS, SEP, MASK = "[CLS]", "[SEP]", "[MASK]"  # of an encoder made from nothing
# For tokenizers without a chat template: turns as they are, a user's ended by a separator.
PLAIN_TEMPLATE = (
    "{{% for m in messages %}}{{{{ m.content }}}}"
    "{{% if m.role == 'assistant' %}}{{{{ eos_token }}}}{{% else %}}{{{{ {separator!r} }}}}{{% endif %}}{{% endfor %}}"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Heads stay unquantized: they are trained, and bitsandbytes cannot train what it quantized.
HEADS = ["score", "classifier", "pre_classifier", "pooler", "classification_head", "logits_proj", "sequence_summary", "lm_head"]
UNQUANTIZED = [rf"(.*\.)?{name}" for name in HEADS]  # wherever they stand in the model


def load_tokenizer(
    source: str, *, separator: str = "\n", generates: bool = True, distinct_pad: bool = True, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with a pad token and a chat template (turns ended by `separator` where it brings none).

    One that only reads (not `generates`) needs no EOS. `distinct_pad`: pad ≠ EOS, for ids that end with EOS.
    """
    with loading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.eos_token is None and generates:
        raise UserError(f"{source}: its tokenizer has no EOS token, which marks the end of an answer; expected a decoder's tokenizer")
    if tokenizer.pad_token is None and not distinct_pad:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None or (distinct_pad and tokenizer.pad_token == tokenizer.eos_token):
        spare = [t for t in (tokenizer.unk_token, tokenizer.bos_token) if t and t != tokenizer.eos_token]
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else PAD})  # a new one grows the vocabulary: see `_ready`
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
        with loading(source, "LoRA adapter"):
            adapter = PeftConfig.from_pretrained(source, revision=revision)
        if adapter.task_type not in (None, TaskType.CAUSAL_LM):
            raise UserError(f"{source}: is an adapter of task {adapter.task_type}; a policy needs one of {TaskType.CAUSAL_LM.value}")
        options |= {"quantization": quantization, "precision": precision, "revision": adapter.revision}
        base: Any = load_policy(str(adapter.base_model_name_or_path), tokenizer, **options)
        with loading(source, "LoRA adapter"):
            return PeftModel.from_pretrained(base, source, is_trainable=trainable, revision=revision)
    with loading(source, "causal language model"):
        model = AutoModelForCausalLM.from_pretrained(source, **_weights(quantization, precision), **options)
    return _ready(model, tokenizer)


def merge_adapter(folder: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
    """The adapter in `folder` goes to `folder/adapter`, and the whole model, in fp32, takes its place."""
    model: Any = load_policy(str(folder), tokenizer, **options)
    base = model.get_base_model()
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    if base.config.get_text_config().tie_word_embeddings and any(hasattr(each, "base_layer") for each in embeddings):
        output = getattr(embeddings[1], "base_layer", embeddings[1])  # what is added to one of the two is not the other's
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
            raise UserError(f"{source}: is a LoRA adapter, and a quantized base takes it in only roughly; set quantization: none")
        revision = options.pop("revision", None)
        with loading(source, "LoRA adapter"):
            adapter = PeftConfig.from_pretrained(source, revision=revision)
        adapter.task_type = None  # the policy's, which asks for a model that generates
        base: Any = load_classifier(
            str(adapter.base_model_name_or_path), tokenizer, precision=precision, head=head, revision=adapter.revision, **options
        )
        with loading(source, "LoRA adapter"):
            return PeftModel.from_pretrained(base, source, config=adapter, revision=revision).merge_and_unload()
    outputs = f" with the outputs {', '.join(head['label2id'])}" if head else ""
    with loading(source, f"sequence classifier{outputs}"), _expecting_a_new_head():
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source, output_loading_info=True, **(head or {}), **_weights(quantization, precision), **options
        )
    if found["missing_keys"] and head is None:
        missing = ", ".join(sorted(found["missing_keys"]))
        raise UserError(f"{source}: has no reward head (it lacks {missing}); expected a sequence classifier, such as runs/demo/reward")
    return _ready(model, tokenizer)


def heads(model: torch.nn.Module) -> list[str]:
    """The modules of a classifier that come after what was pretrained, by the last part of their names."""
    return [head for head in HEADS if any(name.split(".")[-1] == head for name, _ in model.named_modules())]


def most_tokens(model: PreTrainedModel) -> int | None:
    """How many tokens a row may have where positions are learned; None where they are computed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe", "embed_positions"):
            # RoBERTa and its kin count on from the pad token's id.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - max(skipped, getattr(module, "offset", 0))  # OPT's has an offset
    return None


def new_head(outputs: Sequence[str], problem_type: str) -> dict[str, Any]:
    """What a model's config says of a head with these outputs: their names, and whether they are scalars (`regression`) or classes
    (`single_label_classification`), which `pipeline()` would squash."""
    return {"id2label": dict(enumerate(outputs)), "label2id": {name: i for i, name in enumerate(outputs)}, "problem_type": problem_type}


def scratch_policy(texts: Iterable[str], size: Scratch, separator: str) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """A new GPT-2 and its tokenizer. Seed torch first."""
    tokenizer = scratch_tokenizer(texts, size, separator)
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GPT2LMHeadModel(scratch_decoder(size, len(tokenizer), **ids)), tokenizer


def scratch_decoder(size: Scratch, vocabulary: int, **more: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=size.positions,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **more,
    )


def scratch_classifier(
    texts: Iterable[str], size: Scratch, separator: str, head: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new encoder that classifies sequences, and its tokenizer. Seed torch first. Raises `UserError` for what is no encoder."""
    tokenizer = scratch_tokenizer(texts, size, separator, encoder=True)
    with loading(size.architecture, "architecture of an encoder"):
        config = scratch_encoder(size, len(tokenizer), pad_token_id=tokenizer.pad_token_id, **head)
        if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError("it is no encoder; of decoders the reward model starts from a policy: model: runs/demo/sft")
        return AutoModelForSequenceClassification.from_config(config), tokenizer


def scratch_encoder(size: Scratch, vocabulary: int, **more: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(  # each has its own names for these, and ignores the others
        size.architecture,
        vocab_size=vocabulary,
        max_position_embeddings=size.positions + 2,  # RoBERTa counts on from the pad token's id
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        hidden_dim=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        **more,
    )


def scratch_tokenizer(texts: Iterable[str], size: Scratch, separator: str, encoder: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on `texts`; that of an encoder marks the beginning and the end of each segment."""
    special = [PAD, CLS, SEP, MASK] if encoder else [PAD, EOS]
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        sorted(set(texts)),
        trainers.BpeTrainer(vocab_size=size.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    names = {"pad_token": PAD, "eos_token": EOS}
    if encoder:
        ids = [(token, core.token_to_id(token)) for token in (CLS, SEP)]
        core.post_processor = TemplateProcessing(single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=ids)
        names = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=size.positions, **names)
    tokenizer.chat_template = PLAIN_TEMPLATE.format(separator=separator)
    return tokenizer


def disable_dropout(model: torch.nn.Module) -> None:
    """Probability 0 in every dropout of the model and its adapters: `train()` mode then computes what `eval()` mode does."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # what a forward hands to `nn.functional.dropout`, or draws whole layers by
            if isinstance(value, float) and any(part in name for part in ("dropout", "layerdrop", "jitter")):
                setattr(module, name, 0.0)


def fuse_gelu(model: torch.nn.Module) -> None:
    """GPT-2's tanh GELU by torch's own kernel: the same function, of which transformers' Python makes eight passes over memory."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def _weights(quantization: str, precision: str) -> dict[str, Any]:
    """`from_pretrained` arguments. Quantized weights compute in the chosen precision."""
    dtype = DTYPES[precision]
    if quantization == "none":
        return {"dtype": dtype}
    if quantization == "8bit":
        return {"dtype": dtype, "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED)}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=UNQUANTIZED
    )
    return {"dtype": dtype, "quantization_config": four_bit}


def _ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
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
def _expecting_a_new_head() -> Iterator[None]:
    """No load report: that a language model brings no reward head is why one is made."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def loading(source: str, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{source}: cannot be loaded as a {what}: {reason}; expected a Hugging Face folder or a hub id") from error
