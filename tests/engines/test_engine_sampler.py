"""The real engine samples as the built-in sampler does: the same distributions, and log-probabilities."""

from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.engines.policy_server import check_processed_logprobs, probe_policy_server, served_names
from pipeline.engines.sampler import EngineSampler
from pipeline.errors import UserError
from pipeline.models.generation import generate, uniforms

pytestmark = pytest.mark.engines

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
SAMPLES = 4000
EOS = 1
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4, "temperature": 1.5},
    "top-p": {"top_p": 0.6},
    "minimum length": {"min_response_tokens": 1},
    "stop token": {"stop_token": "w12", "min_response_tokens": 1},
}


@pytest.fixture(scope="module")
def server(sampling_server):
    return probe_policy_server(sampling_server, 60)


@pytest.fixture(scope="module")
def words(word_policy):
    policy = AutoModelForCausalLM.from_pretrained(word_policy)
    return policy.eval(), AutoTokenizer.from_pretrained(word_policy)


def difference(first, second):
    """Return by how many standard deviations the χ² of two samples of one size is above its mean.

    The cube root of χ²/df is nearly normal (Wilson and Hilferty 1931). Cells under ten are one cell.
    """
    pairs = [(first[cell], second[cell]) for cell in first.keys() | second.keys()]
    large = [pair for pair in pairs if sum(pair) >= 10]
    small = tuple(map(sum, zip(*(pair for pair in pairs if sum(pair) < 10), strict=True))) or (0, 0)
    cells = large + ([small] if sum(small) else [])
    chi_square, freedom = sum((a - b) ** 2 / (a + b) for a, b in cells), len(cells) - 1
    return ((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5


def sample(sampler, words, count, tokens, prompts=PROMPTS[:1], seed=0, **options):
    rows = [prompts[row % len(prompts)] for row in range(count)]
    return sampler(*words, rows, uniforms(seed, 0, range(count), tokens), batch_size=1000, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_samplers_have_one_distribution(options, server, words):
    """Of whole responses of up to two tokens, with the one that ends them."""
    temperature = options.get("temperature", 1.0)
    ours = sample(generate, words, SAMPLES, 2, **options)
    theirs = sample(EngineSampler([server], 120), words, SAMPLES, 2, **options)
    other = sample(generate, words, SAMPLES, 2, seed=1, **options | {"temperature": 0.5 * temperature})
    ids = [map(tuple, responses.token_lists()) for responses in (ours, theirs, other)]
    counts = list(map(Counter, ids))
    assert difference(counts[0], counts[1]) < 4.5 < difference(counts[0], counts[2])
    fractions = [sum(responses.ended) / SAMPLES for responses in (ours, theirs)]
    assert abs(fractions[0] - fractions[1]) < 4.5 * (0.5 / SAMPLES) ** 0.5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_engines_log_probabilities_are_those_of_the_sampled_distribution(options, server, words):
    policy, tokenizer = words
    tokens = 12
    responses = sample(EngineSampler([server, server], 120), words, 60, tokens, PROMPTS, **options)
    ends = [EOS, *([tokenizer.get_vocab()[options["stop_token"]]] if "stop_token" in options else [])]
    minimum = options.get("min_response_tokens", 0)
    warpers = [TemperatureLogitsWarper(options.get("temperature", 1.0))]
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))

    assert responses.sampler_logprobs.shape == responses.response_ids.shape
    assert (responses.sampler_logprobs[responses.response_mask == 0] == 0).all()
    for row, ids in enumerate(responses.token_lists()):
        prompt = PROMPTS[row % len(PROMPTS)]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        logits[:, len(tokenizer) :] = -torch.inf
        logits[:minimum, ends] = -torch.inf
        for warper in warpers:
            logits = warper(None, logits)
        expected = logits.log_softmax(-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(responses.sampler_logprobs[row, : len(ids)], expected, atol=1e-4, rtol=0)

        assert responses.ended[row] == (ids[-1] in ends)
        assert not set(ids[:-1]) & set(ends)
        assert len(ids) == tokens or responses.ended[row]
        assert len(ids) > minimum
        assert max(ids) < len(tokenizer)
    assert {True, False} == set(responses.ended)


def test_a_server_reports_what_it_serves_and_accepts(server, word_policy):
    assert server[1:] == (str(word_policy), str(word_policy), 128, True, True)
    assert served_names(server, 60) == {str(word_policy): str(word_policy)}
    check_processed_logprobs(server, 60)


def test_another_model_and_too_long_a_row_are_refused(server, words):
    sampler = EngineSampler([server], 60)
    sampler.model = "step-000040"
    with pytest.raises(UserError, match=r"returned 404, .*step-000040.*; expected the model 'step-000040'"):
        sample(sampler, words, 2, 3)
    with pytest.raises(UserError, match="accepts 128 tokens, but a prompt and response have 129; start it"):
        sample(EngineSampler([server], 60), words, 2, 126)
