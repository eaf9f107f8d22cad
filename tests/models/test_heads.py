"""A classifier's new layers are found by where they are, whatever their names."""

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipeline.models.heads import UNQUANTIZED, find_unquantized, head_module_names
from pipeline.models.loading import head_config, load_classifier, load_tokenizer


def test_layers_beside_the_trunk_are_heads(tiny_tokenizer, tmp_path) -> None:
    """EuroBERT's new `dense` has no name of a head. It must be neither quantized nor left untrained."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "eurobert", vocab_size=len(tiny_tokenizer), num_key_value_heads=4, pad_token_id=0, **size
    )
    base = AutoModelForSequenceClassification.from_config(config)
    assert head_module_names(base) == ["classifier", "dense"]
    base.model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)

    state = torch.get_rng_state()
    assert find_unquantized(str(tmp_path)) == [*UNQUANTIZED, "^dense"]
    assert torch.equal(torch.get_rng_state(), state)
    head = head_config(["reward"], "regression")
    model = load_classifier(str(tmp_path), load_tokenizer(str(tmp_path)), quantization="8bit", head=head)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert (kinds["dense"], kinds["classifier"]) == ("Linear", "Linear")
    assert kinds["model.layers.0.mlp.up_proj"] == "Linear8bitLt"
