"""Log-probabilities equal those of an unpadded row, and their gradient that of torch's own functions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Scratch
from pipeline.errors import UserError
from pipeline.models import logprobs as module
from pipeline.models.chat import pad_rows
from pipeline.models.logprobs import LogProbability, response_logprobs, scatter_to_mask
from pipeline.models.scratch import new_policy
from pipeline.models.truncation import Truncation

TEMPERATURE = 0.8
PROMPTS = [[5, 6, 7, 8, 9], [3], [4, 4, 4]]
RESPONSES = [[10, 11], [12, 13, 14, 15], [16]]


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "gpt2":
        size = Scratch(layers=2, width=32, heads=4, vocabulary=260, positions=32)
        found: Any = new_policy(["the cat sat"], size, "\n")[0]
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        found = LlamaForCausalLM(LlamaConfig(vocab_size=260, max_position_embeddings=32, **sizes))
    for parameter in found.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


def tensors(filler: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*pad_rows(PROMPTS, filler, side="left"), *pad_rows(RESPONSES, filler))


@pytest.mark.parametrize("rows", [2, 16])
def test_logprobs_equal_those_of_an_unpadded_row(
    model: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_ROWS", rows)
    found = response_logprobs(model, *tensors(), TEMPERATURE)
    hidden = found.hidden.split([len(answer) for answer in RESPONSES])
    for row, (prompt, answer) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        out = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        steps = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        every = (out.logits[0, steps] / TEMPERATURE).log_softmax(-1)
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(
            found.logprobs[row, : len(answer)], every[range(len(answer)), answer], **close
        )
        torch.testing.assert_close(found.entropy[row, : len(answer)], -(every.exp() * every).sum(-1), **close)
        torch.testing.assert_close(hidden[row], out.hidden_states[-1][0, steps], **close)
        assert found.logprobs[row, len(answer) :].eq(0).all()


def test_responses_are_read_within_a_budget_of_logits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(module, "MAX_LOGITS", 7 * vocabulary)
    assert [module.rows_within_budget(model, tokens) for tokens in (1, 3, 7, 8)] == [7, 2, 1, 1]


def test_cudnn_attention_is_off() -> None:
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_padding_ids_do_not_matter(model: Any) -> None:
    assert all(
        torch.equal(*pair)
        for pair in zip(
            response_logprobs(model, *tensors(0))[:3], response_logprobs(model, *tensors(77))[:3], strict=True
        )
    )


def test_log_probabilities_under_a_truncation_come_from_the_same_logits(model: Any) -> None:
    """The ends are all ids of the responses, which cannot come in the first two steps."""
    ends = tuple({token for answer in RESPONSES for token in answer})
    plain = response_logprobs(model, *tensors(), TEMPERATURE)
    found = response_logprobs(model, *tensors(), TEMPERATURE, Truncation(0, 1.0, 2, ends))
    assert plain.truncated is None
    assert all(torch.equal(*pair) for pair in zip(plain[:3], found[:3], strict=True))
    mask = pad_rows(RESPONSES, 0)[1].bool()
    expected = torch.where(mask, plain.logprobs, 0.0)
    expected[:, :2] = torch.where(mask[:, :2], -torch.inf, 0.0)
    torch.testing.assert_close(found.truncated, expected)
    assert not found.truncated.requires_grad


def test_the_gradient_of_the_model_is_that_of_plain_rows(model: Any) -> None:
    response_logprobs(model, *tensors(), TEMPERATURE).logprobs.sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for prompt, answer in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        (-torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 12, 2**22])
def test_log_probability_and_entropy_have_the_right_gradients(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    logits, ids = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 5, 2, 2, 1])
    logprobs, entropy = LogProbability.apply(logits, ids, 0.7)
    every = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(logprobs, every.gather(1, ids[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(every.exp() * every).sum(-1))
    assert torch.autograd.gradcheck(lambda x: LogProbability.apply(x, ids, 0.7), (logits,))
    for part in (0, 1):  # each alone, and both, which gradcheck does
        assert torch.autograd.gradcheck(
            lambda x, part=part: LogProbability.apply(x, ids, 0.7)[part], (logits,)
        )


def test_by_hand() -> None:
    """Logits log 1, log 3 at temperature 1: p = (¼, ¾), H = ¼ log 4 + ¾ log 4/3."""
    logprobs, entropy = LogProbability.apply(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([0]), 1.0)
    assert logprobs.item() == pytest.approx(-1.3862944)
    assert entropy.item() == pytest.approx(0.25 * 1.3862944 + 0.75 * 0.2876821)


def test_half_precision_is_computed_in_single() -> None:
    logits = torch.randn(3, 9).bfloat16()
    found = LogProbability.apply(logits, torch.tensor([1, 2, 3]), 1.0)[0]
    torch.testing.assert_close(found, logits.float().log_softmax(-1)[[0, 1, 2], [1, 2, 3]])


def test_scatter_to_mask() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    assert scatter_to_mask(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]


def test_a_model_without_an_output_layer_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="has no output embeddings; expected a causal language model"):
        response_logprobs(model.base_model, *tensors())
