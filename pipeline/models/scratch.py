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
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from pipeline.config import Scratch
from pipeline.models.chat import EOS, PAD, PLAIN_TEMPLATE
from pipeline.models.loading import explain_load_errors

CLS, SEP, MASK = "[CLS]", "[SEP]", "[MASK]"  # of an encoder made from nothing


def new_policy(
    texts: Iterable[str], size: Scratch, separator: str
) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase]:
    """A new GPT-2 and its tokenizer. Seed torch first."""
    tokenizer = train_tokenizer(texts, size, separator)
    ids = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return GPT2LMHeadModel(decoder_config(size, len(tokenizer), **ids)), tokenizer


def decoder_config(size: Scratch, vocabulary: int, **more: Any) -> GPT2Config:
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


def new_classifier(
    texts: Iterable[str], size: Scratch, separator: str, head: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A new encoder that classifies sequences, and its tokenizer. Seed torch first. Raises `UserError` for what is no encoder."""
    tokenizer = train_tokenizer(texts, size, separator, encoder=True)
    with explain_load_errors(size.architecture, "architecture of an encoder"):
        config = encoder_config(size, len(tokenizer), pad_token_id=tokenizer.pad_token_id, **head)
        if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(
                "it is no encoder; of decoders the reward model starts from a policy: model: runs/demo/sft"
            )
        return AutoModelForSequenceClassification.from_config(config), tokenizer


def encoder_config(size: Scratch, vocabulary: int, **more: Any) -> PreTrainedConfig:
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


def train_tokenizer(
    texts: Iterable[str], size: Scratch, separator: str, encoder: bool = False
) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on `texts`; that of an encoder marks the beginning and the end of each segment."""
    special = [PAD, CLS, SEP, MASK] if encoder else [PAD, EOS]
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        sorted(set(texts)),
        trainers.BpeTrainer(
            vocab_size=size.vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    names = {"pad_token": PAD, "eos_token": EOS}
    if encoder:
        ids = [(token, core.token_to_id(token)) for token in (CLS, SEP)]
        core.post_processor = TemplateProcessing(
            single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=ids
        )
        names = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=size.positions, **names)
    tokenizer.chat_template = PLAIN_TEMPLATE.format(separator=separator)
    return tokenizer


def collect_texts(rows: Iterable[dict[str, Any]], *columns: str) -> list[str]:
    """Every string in the columns, messages flattened: what a scratch tokenizer learns from."""
    found: list[str] = []
    for row in rows:
        for column in columns:
            value = row[column]
            found += [value] if isinstance(value, str) else [message["content"] for message in value]
    return found
