"""Rollouts: the policy that is asked, prompts of any length, responses of one token."""

import pytest
from datasets import Dataset

from pipeline.errors import UserError
from pipeline.models.chat import prompt_ids
from pipeline.models.ends import declared_ends
from tests.ppo.making import changed


def test_the_live_policy_is_asked_by_one_small_interface(make):
    from pipeline.models import generation

    asked = []

    def generate(policy, tokenizer, prompts, noise, **drawing):
        asked.append((len(prompts), tuple(noise.shape), drawing))
        return generation.generate(policy, tokenizer, prompts, noise, **drawing)

    make(generate=generate, num_rollouts=2, top_k=7, stop_token=".", min_response_tokens=2).train()
    drawing = {
        "temperature": 1.0,
        "top_k": 7,
        "top_p": 1.0,
        "min_response_tokens": 2,
        "stop_token": ".",
        "batch_size": 64,
    }
    assert asked == [(4, (4, 6), drawing)] * 2


def test_a_published_policy_declares_its_stop_token(make, tiny_tokenizer, tmp_path):
    trainer = make(stop_token=".")
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    ends = [tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids(".")]
    assert declared_ends(str(tmp_path / "policy")) == ends


def test_prompts_that_are_too_long_are_dropped_or_cut_at_their_end(make, capsys):
    data = Dataset.from_list([{"prompt": "Hello."}, {"prompt": "Hello. " * 30}])
    trainer = make(data=data, max_prompt_tokens=8, overlong="drop")
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (1, 1)
    assert "ppo: prompts of train_dataset: over 8 tokens (overlong: drop): 1 of 2" in capsys.readouterr().out
    trainer = make(data=data, max_prompt_tokens=8, overlong="truncate_right")
    ids = prompt_ids(trainer.processing_class, data[1]["prompt"])[:8]
    responses = trainer.sample(data, [1], 0, [0])
    assert responses.query_ids[0].tolist() == ids


@pytest.mark.parametrize(
    "prompts",
    [["", "Hello."], ["<|eos|>", "Hello."], ["word " * 500, "Hello."]],
    ids=["empty", "only EOS", "long"],
)
def test_prompts_of_any_length_are_answered(make, prompts):
    trainer = make(data=Dataset.from_list([{"prompt": prompt} for prompt in prompts]), num_rollouts=2)
    trainer.train()
    widths = trainer.collect(0).responses.query_mask.sum(1)
    assert widths.min() >= 1
    assert widths.max() <= 128 - 6  # the policy's positions, less the answer


def test_an_answer_of_one_token_is_trained_on(make):
    trainer = make(response_tokens=1)
    assert trainer.collect(0).mask.sum(1).tolist() == [1] * 4
    assert "value_head.bias" in changed(trainer)


def test_no_room_for_a_prompt_is_an_error(make):
    with pytest.raises(
        UserError, match="response_tokens=128 leaves no room for a prompt in the policy's 128 positions"
    ):
        make(response_tokens=128)


def test_a_head_on_other_states_than_the_layers_own(make, tiny_tokenizer):
    """OPT-350m's output layer reads 512 numbers of 1,024; its positions begin at 2."""
    from transformers import OPTConfig, OPTForCausalLM

    size = {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
    }
    policy = OPTForCausalLM(
        OPTConfig(**size, vocab_size=len(tiny_tokenizer), max_position_embeddings=64, pad_token_id=0)
    )
    trainer = make(policy=policy, data=Dataset.from_list([{"prompt": "word " * 200}]))
    trainer.train()
    assert trainer.actor.value_head.in_features == 16
    assert int(trainer.collect(0).responses.query_mask.sum(1)[0]) == 64 - 6
