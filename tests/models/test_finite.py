"""A weight that is not finite is found wherever it is."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.models.finite import find_nonfinite
from pipeline.models.loading import load_classifier, load_policy, load_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value, dtype):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).to(dtype)
    model.register_buffer("mask", torch.tensor([float("-inf")]))  # masks contain infinities
    assert find_nonfinite(model) is None
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model[1].weight[2] = value
    assert find_nonfinite(model) == "1.weight"
    assert find_nonfinite(model, state) is None  # the gathered state counts, not the shards of this process
    assert find_nonfinite(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), model.state_dict()) == "1.weight"


def test_what_has_no_numbers_is_finite():
    assert find_nonfinite(nn.Linear(2, 3, device="meta")) is None
    assert find_nonfinite(nn.Linear(0, 3, bias=False)) is None


@pytest.mark.parametrize("load", [load_policy, load_classifier])
def test_a_model_of_nan_is_refused_when_it_is_loaded(load, tiny_gpt2, tmp_path):
    for file in tiny_gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny_gpt2 / "model.safetensors")
    weights["transformer.h.1.ln_1.bias"][3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    head = {} if load is load_policy else {"head": {"num_labels": 1, "label2id": {"r": 0}}}
    with pytest.raises(UserError, match=r"its weight transformer\.h\.1\.ln_1\.bias is not finite"):
        load(str(tmp_path), load_tokenizer(str(tmp_path)), **head)
