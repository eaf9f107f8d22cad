"""Tiny tokenizers whose special tokens and chat templates are in the manner of published families."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

TEXTS = ["Name a fruit. An apple.", "user assistant system model think Today is 2026"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The last answer has an empty block of thoughts; earlier answers have none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens a block of thoughts that is not in a finished answer.
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Nothing but a line break ends a turn, and the template writes no BOS.
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
LLAMA3_TOKENS = ["<|begin|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
PHI3_TOKENS = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
LLAMA2_TOKENS = ["<unk>", "<s>", "</s>"]

# By family: template, special tokens, their names, whether the tokenizer puts a BOS before a text, and an EOS
# behind it.
FAMILIES = {
    "qwen": (CHATML, CHATML_TOKENS, {"pad": "<|endoftext|>", "eos": "<|im_end|>"}, "$A"),
    "qwen-base": (CHATML, CHATML_TOKENS, {"pad": "<|endoftext|>", "eos": "<|endoftext|>"}, "$A"),
    "thinking": (THINKING, CHATML_TOKENS, {"pad": "<|endoftext|>", "eos": "<|im_end|>"}, "$A"),
    "opened": (OPENED, CHATML_TOKENS, {"pad": "<|endoftext|>", "eos": "<|im_end|>"}, "$A"),
    "dated": (DATED, CHATML_TOKENS, {"pad": "<|endoftext|>", "eos": "<|im_end|>"}, "$A"),
    "gemma": (GEMMA, GEMMA_TOKENS, {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>"}, "<bos> $A"),
    "llama3": (LLAMA3, LLAMA3_TOKENS, {"eos": "<|eot_id|>", "bos": "<|begin|>"}, "<|begin|> $A"),
    "phi3": (PHI3, PHI3_TOKENS, {"pad": "<|endoftext|>", "eos": "<|endoftext|>"}, "$A"),
    "llama2": (None, LLAMA2_TOKENS, {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}, "<s> $A"),
    "both-ends": (None, LLAMA2_TOKENS, {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}, "<s> $A </s>"),
    "bare": (BARE, LLAMA2_TOKENS, {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}, "<s> $A"),
}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with the special tokens and the template of a family."""
    template, special, names, single = FAMILIES[family]
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    used = [(token, core.token_to_id(token)) for token in special if token in single]
    core.post_processor = TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=used)
    tokens = {f"{name}_token": token for name, token in names.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def save_llama(folder: Path, family: str, labels: int | None = None, **generation: Any) -> Path:
    """Save a tiny random Llama with the tokenizer of a family, a classifier if it has `labels`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(family)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"num_labels": labels} if labels else {}),
    )
    model = (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config)
    if generation:
        model.generation_config.update(**generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
