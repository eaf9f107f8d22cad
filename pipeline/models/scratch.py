"""Models and tokenizers from scratch: a small GPT-2, a small encoder, a byte-level BPE."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pipeline.config import Scratch
from pipeline.models.chat import EOS, PAD
from pipeline.models.loading import explain_load_errors
from pipeline.models.templates import PLAIN_TEMPLATE

CLS, SEP, MASK = "[CLS]", "[SEP]", "[MASK]"  # special tokens of an encoder from scratch


def new_policy(
    texts: Iterable[str], size: Scratch, separator: str
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """Build a randomly initialized GPT-2 and its tokenizer, trained on `texts`. Seed torch first."""
    tokenizer = train_tokenizer(texts, size, separator)
    config = decoder_config(
        size,
        len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config), tokenizer


def decoder_config(size: Scratch, vocabulary: int, **options: Any) -> GPT2Config:
    """Return the config of a GPT-2 of this size with `vocabulary` tokens, without dropout."""
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
        **options,
    )


def new_classifier(
    texts: Iterable[str],
    size: Scratch,
    separator: str,
    head: dict[str, Any],
    auto_class: Any = AutoModelForSequenceClassification,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a randomly initialized encoder with a head of `auto_class`, and its tokenizer.

    `head` is a `head_config`. A head for every token may also be on a GPT-2. Seed torch first. Raises
    `UserError` if the architecture is no encoder.
    """
    if auto_class is AutoModelForTokenClassification and size.architecture == "gpt2":
        return _new_decoder(texts, size, separator, head)
    tokenizer = train_tokenizer(texts, size, separator, encoder=True)
    with explain_load_errors(size.architecture, "type of encoder"):
        config = encoder_config(size, len(tokenizer), pad_token_id=tokenizer.pad_token_id, **head)
        if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(
                "it is no encoder; a reward model on a decoder starts from a policy: model: runs/demo/sft"
            )
        return auto_class.from_config(config, trust_remote_code=False), tokenizer


def _new_decoder(
    texts: Iterable[str], size: Scratch, separator: str, head: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = train_tokenizer(texts, size, separator)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = decoder_config(size, len(tokenizer), classifier_dropout=0.0, **ends, **head)
    return GPT2ForTokenClassification(config), tokenizer


def encoder_config(size: Scratch, vocabulary: int, **options: Any) -> PreTrainedConfig:
    """Return the config of an encoder of this size and architecture with `vocabulary` tokens."""
    # Architectures name these differently, and each ignores the names of the others.
    return AutoConfig.for_model(
        size.architecture,
        vocab_size=vocabulary,
        max_position_embeddings=size.positions + 2,  # RoBERTa counts positions from the pad token's id on
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        hidden_dim=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        **options,
    )


def train_tokenizer(
    texts: Iterable[str], size: Scratch, separator: str, encoder: bool = False
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts`; `separator` ends turns in its chat template.

    With `encoder`, the tokenizer marks the beginning and the end of each segment, as BERT's does.
    """
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[PAD, CLS, SEP, MASK] if encoder else [PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sorted(set(texts)), trainer)

    names = {"pad_token": PAD, "eos_token": EOS}
    if encoder:
        names = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
        core.post_processor = TemplateProcessing(
            single=f"{CLS} $A {SEP}",
            pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
            special_tokens=[(token, core.token_to_id(token)) for token in (CLS, SEP)],
        )

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=size.positions, **names)
    tokenizer.chat_template = PLAIN_TEMPLATE.format(separator=separator)
    return tokenizer


def collect_texts(rows: Iterable[dict[str, Any]], *columns: str) -> list[str]:
    """Return every string in the columns, with messages flattened, to train a tokenizer on."""
    texts: list[str] = []
    for row in rows:
        for column in columns:
            value = row[column]
            texts += [value] if isinstance(value, str) else [message["content"] for message in value]
    return texts
