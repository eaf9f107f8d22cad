"""Generation configs that could not be saved after training."""

import json

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from pipeline.models.generation_config import make_savable
from pipeline.models.loading import load_policy, load_tokenizer


@pytest.fixture
def load(tiny_llama, tiny_tokenizer, tmp_path):
    def with_config(**generation):
        folder = tmp_path / "base"
        AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return load_policy(str(folder), load_tokenizer(str(folder)))

    return with_config


@pytest.mark.parametrize(
    ("generation", "kept", "removed"),
    [
        (
            {
                "do_sample": False,
                "temperature": 0.9,
                "top_p": 0.6,
                "eos_token_id": [0, 1],
                "max_new_tokens": 9,
            },
            {"do_sample": False, "eos_token_id": [0, 1], "max_new_tokens": 9},
            "temperature, top_p",
        ),
        ({"early_stopping": True, "length_penalty": 2.0}, {}, "early_stopping, length_penalty"),
        ({"pad_token_id": -1, "eos_token_id": 1, "max_new_tokens": 9}, {"eos_token_id": 1}, "max_new_tokens"),
        ({"pad_token_id": -1, "top_k": 3, "eos_token_id": 0}, {"eos_token_id": 0}, "top_k"),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            {"do_sample": True, "temperature": 0.6},
            None,
        ),
    ],
)
def test_contradictions_are_removed_when_a_model_is_loaded(generation, kept, removed, load, tmp_path, caplog):
    model = load(**generation)
    assert (removed is None) == (not caplog.records)
    assert removed is None or removed in caplog.text
    model.generation_config.eos_token_id = kept.get("eos_token_id", 1)  # as trainers change it
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved").to_diff_dict()
    assert kept.items() <= saved.items()
    lost = generation.keys() - saved.keys()
    assert set((removed or "").split(", ")) - {""} <= lost


def test_generation_settings_in_the_config_of_a_model_are_removed(load, tmp_path, caplog):
    model = load()
    model.config.temperature = 0.7
    with pytest.raises(ValueError, match="generation parameters"):
        model.save_pretrained(tmp_path / "saved")
    make_savable(model)
    assert "removed from it: temperature" in caplog.text
    model.save_pretrained(tmp_path / "saved")
