"""A row over the limit fails in the model, and one at the limit does not; the limit is known beforehand."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from pipeline.models.positions import max_positions, mixing_limit

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
HEADS = {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_positions": 48}
LIMITED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": ({}, 48),
    "openai-gpt": (HEADS, 48),
    "gptj": ({**HEADS, "rotary_dim": 4}, 48),
    "codegen": ({**HEADS, "rotary_dim": 4}, 48),
    "ctrl": ({**HEADS, "dff": 64}, 48),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 48}, 48),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, 48),
    "bert": ({}, 48),
    "roberta": ({"pad_token_id": 1}, 46),
    "yoso": ({}, 48),
}
UNLIMITED: dict[str, dict[str, Any]] = {
    "llama": {},
    "bloom": {"n_layer": 1, "n_head": 4},
    "xglm": {"d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 64},
    "mamba": {"state_size": 8},
}


def make(architecture: str, **options: Any) -> Any:
    return AutoModel.from_config(AutoConfig.for_model(architecture, **SIZES | options)).eval()


@pytest.mark.parametrize("architecture", LIMITED)
def test_tables_of_positions_end(architecture: str) -> None:
    options, limit = LIMITED[architecture]
    model = make(architecture, **options)
    assert max_positions(model) == limit
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 7))
    with torch.device("meta"):
        assert max_positions(make(architecture, **options)) == limit


@pytest.mark.parametrize("architecture", UNLIMITED)
def test_computed_positions_go_on(architecture: str) -> None:
    model = make(architecture, **UNLIMITED[architecture])
    assert max_positions(model) is None
    with torch.no_grad():
        model(input_ids=torch.full((1, 49), 7))


def test_rotary_positions_that_are_rescaled_mix_up_to_the_original_context() -> None:
    """Beyond it, the longest row of a batch decides the positions of all."""
    dynamic = make("llama", max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    assert (mixing_limit(dynamic), max_positions(dynamic)) == (16, None)
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    longrope = make(
        "phi3",
        pad_token_id=0,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", **factors},
    )
    assert (mixing_limit(longrope), max_positions(longrope)) == (16, None)


def test_a_limit_that_no_table_shows_is_found_by_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.positions.POSITION_TABLES", ())
    assert max_positions(make("gptj", **LIMITED["gptj"][0])) == 48
    assert max_positions(make("llama")) is None
