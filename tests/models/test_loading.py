"""Tokenizers as published ones are, made ready to train with."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.models.chat import PAD
from pipeline.models.loading import load_policy, load_tokenizer

END = "<|endoftext|>"


@pytest.fixture
def like_gpt2(tmp_path):
    """One token that begins, ends and is unknown, none that pads, as OpenAI's GPT-2 has it; and a model with
    as many rows.
    """
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        ["a b c"], BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=ByteLevel.alphabet())
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, unk_token=END
    ).save_pretrained(tmp_path)
    rows = core.get_vocab_size()
    GPT2LMHeadModel(
        GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).save_pretrained(tmp_path)
    return tmp_path, rows


def test_a_tokenizer_without_a_pad_token_gets_a_new_one(like_gpt2):
    folder, rows = like_gpt2
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == (PAD, rows, rows + 1)
    assert tokenizer.eos_token_id == tokenizer.get_vocab()[END] != tokenizer.pad_token_id
    assert tokenizer(["a b", "a"], padding=True)["input_ids"][1][-1] == rows
    model = load_policy(str(folder), tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == rows + 1
    plain = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert model.get_input_embeddings().weight[rows].tolist() == pytest.approx(
        plain.mean(0).tolist(), abs=1e-6
    )


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tiny_llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    get_peft_model(base, lora).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.get_vocab() == load_tokenizer(str(tiny_llama)).get_vocab()


def test_where_no_eos_ends_the_ids_pad_may_be_eos(like_gpt2):
    tokenizer = load_tokenizer(str(like_gpt2[0]), distinct_pad=False)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_4bit_model_computes_the_same_after_an_evaluation(tiny_llama):
    """On CPUs with AVX512-BF16 bitsandbytes would repack the weights in eval mode, for a kernel without a
    backward.
    """
    tokenizer = load_tokenizer(str(tiny_llama))
    model = load_policy(str(tiny_llama), tokenizer, quantization="4bit")
    ids = torch.tensor([[5, 6, 7]])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()

    def gradient():
        model.train()
        model(inputs_embeds=embeddings).logits.sum().backward()
        found, embeddings.grad = embeddings.grad, None
        return found

    before = gradient()
    assert before.abs().max() > 0
    with torch.no_grad():
        model.eval()(input_ids=ids)
    torch.testing.assert_close(gradient(), before, rtol=0, atol=0)
