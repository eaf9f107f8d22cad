"""What a program passes to `RewardModel` is checked by name, and named if it is of another kind."""

import math
import re

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from pipeline import RewardModel
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A random GPT-2 with a scalar head, as another library saves one."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tiny_tokenizer), "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**size, num_labels=1, pad_token_id=tiny_tokenizer.pad_token_id)
    folder = tmp_path_factory.mktemp("classifier")
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rm(folder):
    return RewardModel.load(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": 3}, "source: expected the path or hub id of a classifier, found a int"),
        ({"source": None}, "source: expected the path or hub id of a classifier, found None"),
        ({"precision": "fp8"}, "precision='fp8': expected one of fp32, bf16, fp16"),
        ({"precision": torch.float32}, "precision=torch.float32: expected one of fp32, bf16, fp16"),
        ({"model": "gpt2"}, "model: expected a classifier of transformers, found a str"),
        ({"model": nn.Linear(2, 2)}, "model: expected a classifier of transformers, found a Linear"),
        ({"tokenizer": 3}, "tokenizer: expected the classifier's tokenizer, found a int"),
        ({"tokenizer": []}, "tokenizer: expected the classifier's tokenizer, found a list"),
        ({"device": "gpu"}, "load: device='gpu': "),
        ({"device": []}, "load: device=[]: "),
        ({"revision": 3}, "revision: expected text, or None, found a int"),
        ({"trust_remote_code": "yes"}, "trust_remote_code: expected True or False, found a str"),
        (
            {"quantization": "4bit"},
            "load: quantization: reward.json and the model's own config set it; remove",
        ),
        ({"encoding": 3}, "encoding=3: expected a dict with keys of form, "),
        ({"encoding": {"max_length": "64"}}, "encoding.max_length: "),
        ({"encoding": {"max_length": 2.5}}, "encoding.max_length: "),
        ({"encoding": {"max_length": True}}, "encoding.max_length: "),
        ({"encoding": {"max_length": 0}}, "encoding.max_length: "),
        ({"encoding": {"eos": "no"}}, "encoding.eos: "),
        ({"encoding": {"form": []}}, "encoding.form=[]: expected one of "),
    ],
)
def test_load_names_an_argument_of_another_kind(arguments, message, folder):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
        RewardModel.load(**{"source": folder} | arguments)
    assert "\n" not in str(caught.value)


def test_the_parts_of_a_reward_model_are_checked(rm):
    for parts, message in (
        ((3, rm.tokenizer, rm.settings), "model: expected a classifier of transformers, found a int"),
        ((rm.model, "gpt2", rm.settings), "tokenizer: expected the classifier's tokenizer, found a str"),
        (
            (rm.model, rm.tokenizer, {}),
            "settings: expected RewardSettings; use RewardModel.load, found a dict",
        ),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            RewardModel(*parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "1"}, "alpha='1': expected a finite number, or None"),
        ({"alpha": True}, "alpha=True: expected a finite number, or None"),
        ({"alpha": math.nan}, "alpha=nan: expected a finite number, or None"),
        ({"normalize": None}, "normalize=None: expected True or False"),
        ({"normalize": "no"}, "normalize='no': expected True or False"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected a whole number above 0"),
    ],
)
def test_score_names_an_option_of_another_kind(options, message, rm):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        rm.score(["a"], ["b"], **options)
    assert rm.score(["a"], ["b"], alpha=2) == [2 * rm.score(["a"], ["b"])[0]]


@pytest.mark.parametrize("value", [3, None, math.nan, True, b"a", object(), ["a"], [{"role": "user"}]])
def test_encode_refuses_what_is_no_text(value, rm):
    for name, pair in (("prompt", (value, "a")), ("response", ("a", value))):
        with pytest.raises(UserError, match=rf"^{name}.*: expected a "):
            rm.encode(*pair)


@pytest.mark.parametrize(
    "steps", [3, None, "0.5", [0.5], ["a"], [[]], [[0.5, "a"]], [[math.nan]], {0: [1.0]}]
)
def test_aggregate_refuses_what_are_no_scores_of_steps(steps, rm):
    with pytest.raises(UserError, match=r"^steps\[0\]: expected the scores of the steps of a response"):
        rm.aggregate(steps)
    assert rm.aggregate([[0.5, 0.25], (1,)]) == [0.25, 1]  # the least one, times alpha
