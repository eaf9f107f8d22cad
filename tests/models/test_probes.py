"""Whatever the architecture: samples and logits are those of plain rows, or one line says why not."""

import itertools
import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.models.chat import pad_rows
from pipeline.models.generation import generate, uniforms
from pipeline.models.logprobs import response_logprobs
from pipeline.models.probes import Sampling, describe_sampling, reads_padding, require_decoder
from tests.models.architectures import make_model

PLAIN = Sampling(padding=True, cache=True)
WHOLE = Sampling(padding=True, cache=True, compact=False)  # the cache does not let rows leave
OWN_LENGTH = Sampling(padding=False, cache=True)
OWN_LENGTH_WHOLE = Sampling(padding=False, cache=True, compact=False)
OWN_LENGTH_NO_CACHE = Sampling(padding=False, cache=False)

HEADS = {"n_layer": 2, "n_head": 4, "n_embd": 32}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4}
DECODERS: dict[str, tuple[dict[str, Any], Sampling]] = {
    "gpt2": ({}, PLAIN),
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}, PLAIN),
    "gptj": ({**HEADS, "rotary_dim": 4, "n_positions": 64}, PLAIN),
    "mixtral": ({**EXPERTS, "output_router_logits": True}, PLAIN),
    "mamba": ({"state_size": 8}, WHOLE),
    "bart": ({"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, OWN_LENGTH),
    "roformer": ({"is_decoder": True}, OWN_LENGTH),
    "minimax": (
        {**EXPERTS, "head_dim": 8, "block_size": 8, "layer_types": ["linear_attention", "full_attention"]},
        OWN_LENGTH_WHOLE,
    ),
    "recurrent_gemma": (
        {
            "lru_width": 32,
            "attention_window_size": 8,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
        },
        OWN_LENGTH_WHOLE,
    ),
    "rwkv": ({"attention_hidden_size": 32, "context_length": 64}, OWN_LENGTH_NO_CACHE),
}
SCALED: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "phi3": {
        "original_max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    },
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 66},
    "big_bird": {},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
}
PROMPTS = [[40, 50, 60, 70, 80], [90], [45, 55, 65, 75, 85, 95, 105, 115, 125], [46, 56]]
STEPS = 6


def make(architecture: str, **options: Any) -> Any:
    """Return a random policy; its EOS is token 0."""
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    return make_model(AutoModelForCausalLM, architecture, **ids | options)


class Words:
    """As much of a tokenizer as `generate` needs: 160 words."""

    pad_token_id, eos_token_id, chat_template = 1, 0, None
    all_special_tokens, added_tokens_decoder = list[str](), dict[int, Any]()

    def __len__(self) -> int:
        return 160

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@torch.no_grad()
def naive_response(model: Any, prompt: list[int], uniform: list[float]) -> list[int]:
    """One row, no padding, no cache: the token at which the sum of probabilities passes the number."""
    response: list[int] = []
    for number in uniform:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -1]
        sums = itertools.accumulate(logits.double().softmax(-1).tolist())
        response.append(next(i for i, total in enumerate(sums) if total > number))
        if response[-1] == 0:
            break
    return response


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_policy_is_sampled_and_read_as_plain_rows_are(architecture: str) -> None:
    options, way = DECODERS[architecture]
    model = make(architecture, **options)
    assert describe_sampling(model) == way
    assert reads_padding(model)
    check_against_plain_rows(model, model)


@pytest.mark.parametrize("architecture", SCALED)
def test_rows_beyond_the_original_context_are_sampled_and_read_apart(architecture: str) -> None:
    """The longest row of a batch decides the scale of their positions, and so did an earlier one."""
    options = SCALED[architecture]
    model = make(architecture, **options)
    assert describe_sampling(model, 8) == PLAIN
    assert describe_sampling(model, 9) == OWN_LENGTH_NO_CACHE
    check_against_plain_rows(model, lambda **inputs: make(architecture, **options)(**inputs))


def check_against_plain_rows(model: Any, plain: Any) -> None:
    """Compare what is sampled and read with the rows alone, without padding and cache."""
    numbers = uniforms(0, 0, range(4), STEPS).clamp(0.03, 0.97)
    tokens = generate(model, Words(), PROMPTS, numbers).token_lists()
    expected = [
        naive_response(plain, prompt, row) for prompt, row in zip(PROMPTS, numbers.tolist(), strict=True)
    ]
    assert tokens == expected
    rows = (*pad_rows(PROMPTS, 1, side="left"), *pad_rows(tokens, 1))
    with torch.no_grad():
        logprobs = response_logprobs(model, *rows).logprobs
        for prompt, response, row in zip(PROMPTS, tokens, logprobs, strict=True):
            logits = plain(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
            alone = logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(response)), response]
            torch.testing.assert_close(row[: len(response)], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_an_encoder_is_no_policy(architecture: str) -> None:
    model = make(architecture, **ENCODERS[architecture])
    line = f"base: {type(model).__name__} sees the tokens that it is to predict.*; expected a decoder"
    with pytest.raises(UserError, match=line):
        require_decoder(model, "base")
    with pytest.raises(UserError, match="expected a decoder"):
        generate(model, Words(), PROMPTS, torch.zeros(4, 2))
    with pytest.raises(UserError, match="expected a decoder"):
        response_logprobs(model, *pad_rows([[5]], 1), *pad_rows([[6]], 1))


def test_what_is_slow_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make("rwkv", **DECODERS["rwkv"][0])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            describe_sampling(model)
    assert [record.getMessage() for record in caplog.records] == [
        "model: padding changes the samples of RwkvForCausalLM, so prompts of one length form a batch",
        "model: its cache changes the samples of RwkvForCausalLM, so it generates without one, slowly",
    ]


def test_to_ask_changes_nothing() -> None:
    model = make("gpt2")
    model.train()
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    published = model.generation_config
    with torch.autocast("cpu", torch.bfloat16):
        describe_sampling(model)
        assert reads_padding(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is published
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_copy_knows_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import copy

    model = make("bart", **DECODERS["bart"][0])
    describe_sampling(model)
    copied = copy.deepcopy(model)
    monkeypatch.setattr(copied, "generate", lambda **_: pytest.fail("asked again"))
    assert describe_sampling(copied) == OWN_LENGTH


def test_a_model_on_the_meta_device_is_not_asked() -> None:
    with torch.device("meta"):
        model = make("bert")
    require_decoder(model)
    assert describe_sampling(model) == WHOLE


def test_weights_that_are_not_finite_say_nothing() -> None:
    model = make("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    require_decoder(model)
    assert describe_sampling(model) == PLAIN


def test_in_half_precision_rounding_is_no_difference() -> None:
    assert describe_sampling(make("gpt2").to(torch.bfloat16)) == PLAIN
    assert describe_sampling(make("bart", **DECODERS["bart"][0]).to(torch.bfloat16)) == OWN_LENGTH


def test_a_mixture_keeps_its_router_logits_for_training() -> None:
    model = make("mixtral", **DECODERS["mixtral"][0])
    generate(model, Words(), PROMPTS, torch.full((4, 2), 0.5))
    assert model.config.output_router_logits
    assert model(input_ids=torch.tensor(PROMPTS[:1]), labels=torch.tensor(PROMPTS[:1])).aux_loss > 0
