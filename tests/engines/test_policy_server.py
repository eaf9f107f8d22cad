"""Sampling by servers: what is sent, what is accepted of a reply, several servers, and faults."""

import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.engines import requests
from pipeline.engines.policy_server import (
    check_processed_logprobs,
    probe_policy_server,
    request_responses,
    sampling_fields,
)
from pipeline.engines.sampler import EngineSampler, run_at_once, share_out
from pipeline.errors import UserError
from tests.engines.stand_in import POSTED, stand_in

PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 10], [11]]
SAMPLING = sampling_fields(4, ends=[1])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waits between tries, and no open connections."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(requests, "IDLE", {})


@pytest.fixture(scope="module")
def started(word_policy):
    with stand_in(word_policy) as server:
        yield server


@pytest.fixture
def engine(started):
    started.faults, started.asked = [], []
    return started


def test_a_server_reports_what_it_serves_and_accepts(engine, word_policy, monkeypatch):
    assert probe_policy_server(engine.url + "/", 5) == (engine.url, "base", str(word_policy), 128, True, True)
    monkeypatch.setattr(engine, "metrics", "no such metric")  # LoRA may be loaded, and is switched off
    assert probe_policy_server(engine.url, 5)[4:] == (False, True)
    monkeypatch.setattr(engine, "posted", POSTED - {"/v1/load_lora_adapter", "/pause"})
    assert probe_policy_server(engine.url, 5)[4:] == (False, False)
    monkeypatch.setattr(engine, "posted", POSTED - {"/v1/completions"})
    with pytest.raises(UserError, match="serves base, but generates nothing; start one with: vllm serve"):
        probe_policy_server(engine.url, 5)
    monkeypatch.setattr(engine, "models", lambda: {"object": "list"})
    with pytest.raises(UserError, match=r"is no vLLM server: /v1/models returned 200, '\{\"object"):
        probe_policy_server(engine.url, 5)


def test_log_probabilities_of_the_model_alone_are_refused(word_policy):
    for processed in (True, False):
        with stand_in(word_policy, processed=processed) as engine:
            server = probe_policy_server(engine.url, 5)
            if processed:
                check_processed_logprobs(server, 5)
            else:
                with pytest.raises(UserError, match="start it with --logprobs-mode processed_logprobs"):
                    check_processed_logprobs(server, 5)


def test_a_temperature_that_vllm_would_raise_is_refused():
    with pytest.raises(UserError, match=r"^temperature=0.001: vLLM samples at 0.01 or more"):
        sampling_fields(4, ends=[1], temperature=0.001)


def change(**fields):
    """A reply whose second choice has other fields."""

    def edit(reply):
        reply["choices"][1] |= fields
        return reply

    return edit


WRONG = {
    "an aborted response": (
        change(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="abort"),
        "response 1 has 1 of 4 tokens and none that ends it, by the reason 'abort'",
    ),
    "no token": (change(token_ids=[], logprobs={"token_logprobs": []}), "response 1 has 0 of 4 tokens"),
    "too many tokens": (
        change(token_ids=[5] * 5, logprobs={"token_logprobs": [-1.0] * 5}),
        "response 1 has 5 of 4 tokens",
    ),
    "a positive log-probability": (
        change(token_ids=[1], logprobs={"token_logprobs": [0.5]}),
        "response 1 has 1 ids, but not a finite log-probability of each",
    ),
    "an impossible token": (
        change(token_ids=[1], logprobs={"token_logprobs": [-9999.0]}),
        "response 1 has 1 ids, but not a finite log-probability of each",
    ),
    "fewer log-probabilities": (
        change(token_ids=[5, 1], logprobs={"token_logprobs": [-1.0]}),
        "response 1 has 2 ids, but not a finite log-probability of each",
    ),
    "ids that are none": (change(token_ids=["5"]), "response 1 has ids that are no token ids"),
    "another prompt": (change(prompt_token_ids=[4]), "response 1 is to another prompt"),
    "no log-probabilities": (change(logprobs=None), "returned 200, "),
    "an index twice": (change(index=0), "sends 2 responses"),
    "fewer responses": (lambda reply: reply | {"choices": reply["choices"][1:]}, "sends 1 responses"),
    "another model": (lambda reply: reply | {"model": "qwen"}, "answers as the model 'qwen', not 'base'"),
    "another text": (lambda _: "<html>", "returned 200, '<html>'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_reply_is_asked_again_and_then_one_line(name, engine):
    fault, message = WRONG[name]
    server, prompts = probe_policy_server(engine.url, 5), PROMPTS[:2]
    engine.faults = [fault, fault]
    assert len(request_responses(server, prompts, SAMPLING, 5)) == 2
    assert len(engine.asked) == 3
    engine.faults = [fault] * 3
    with pytest.raises(UserError) as error:
        request_responses(server, prompts, SAMPLING, 5)
    assert str(error.value).startswith(f"{engine.url}/v1/completions: {message}")
    assert str(error.value).endswith("; expected 2 responses of up to 4 token ids, in each of 3 tries")


def test_a_server_that_is_away_for_a_while_is_asked_again(engine):
    server = probe_policy_server(engine.url, 5)
    engine.faults = ["drop", (503, "loading"), (500, "EngineDeadError"), "drop"] * 5  # for minutes
    assert len(request_responses(server, PROMPTS, SAMPLING, 3600)) == 5


def test_a_server_that_is_silent_or_gone_is_one_line(engine):
    server = probe_policy_server(engine.url, 5)
    engine.faults = ["hang"]
    message = rf"^{engine.url}/v1/completions: no response: timed out; start one with: vllm serve .* 0.2 s\)$"
    with pytest.raises(UserError, match=message):
        request_responses(server, PROMPTS, SAMPLING, 0.2)
    gone = server._replace(url="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/v1/completions: no response: "):
        request_responses(gone, PROMPTS, SAMPLING, 0.2)


def test_a_server_without_the_policy_of_this_step_says_so(engine):
    server = probe_policy_server(engine.url, 5)
    with pytest.raises(UserError, match=r"returned 404, .*; expected the model 'step-000040': the server"):
        request_responses(server, PROMPTS, SAMPLING, 5, model="step-000040")
    engine.faults = [(400, {"message": "Token id 99 is out of vocabulary"})]
    with pytest.raises(UserError, match=r"returned 400, .*Token id 99 is out of vocabulary.*; expected resp"):
        request_responses(server, PROMPTS, SAMPLING, 5)


def test_a_server_that_is_started_again_while_it_samples_is_an_error(engine, word_policy):
    policy = AutoModelForCausalLM.from_pretrained(word_policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(word_policy)
    sampler = EngineSampler([probe_policy_server(engine.url, 5)], 5)
    sampler.version = engine.version = "of this step"

    def restart(reply):
        engine.restart()
        return reply

    engine.faults = [restart]
    with pytest.raises(UserError, match=r"default.*; expected the version of this step: the server was"):
        sampler(policy, tokenizer, PROMPTS, torch.zeros(5, 6))


def test_prompts_are_shared_out_over_the_servers_in_order(word_policy):
    policy = AutoModelForCausalLM.from_pretrained(word_policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(word_policy)
    with stand_in(word_policy) as first, stand_in(word_policy) as second:
        servers = [probe_policy_server(engine.url, 5) for engine in (first, second)]
        sampler = EngineSampler(servers, 30, rank=1)
        options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_response_tokens": 1}
        responses = sampler(policy, tokenizer, PROMPTS, torch.zeros(5, 6), stop_token="w12", **options)
        (_, sent_second), (_, sent_first) = second.asked[0], first.asked[0]
    assert sent_second["prompt"] == PROMPTS[:3]  # of rank 1
    assert sent_first["prompt"] == PROMPTS[3:]
    assert {name: sent_first[name] for name in ("temperature", "top_k", "top_p", "min_tokens")} == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_tokens": 1,
    }
    assert sent_first["stop_token_ids"] == [1, 12]
    assert sent_first["max_tokens"] == 6
    assert sent_first["logit_bias"] == {str(token): -100.0 for token in (28, 29, 30, 31)}
    assert responses.query_mask.sum(1).tolist() == list(map(len, PROMPTS))
    assert responses.sampler_logprobs.shape == responses.response_ids.shape
    assert ((responses.sampler_logprobs < 0) == responses.response_mask.bool()).all()
    assert [ids[-1] in (1, 12) for ids in responses.token_lists()] == responses.ended


def test_one_server_of_two_that_fails_stops_the_rollout(word_policy):
    policy = AutoModelForCausalLM.from_pretrained(word_policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(word_policy)
    with stand_in(word_policy) as first, stand_in(word_policy) as second:
        servers = [probe_policy_server(engine.url, 5) for engine in (first, second)]
        second.faults = [(400, "no")]
        with pytest.raises(UserError, match=f"^{second.url}/v1/completions: returned 400"):
            EngineSampler(servers, 30)(policy, tokenizer, PROMPTS, torch.zeros(5, 6))


@given(count=st.integers(1, 40), shares=st.integers(1, 7), largest=st.integers(1, 9))
def test_parts_cover_all_rows_in_order_and_evenly(count, shares, largest):
    parts = share_out(count, shares, largest)
    assert [row for _, rows in parts for row in rows] == list(range(count))
    assert all(1 <= len(rows) <= largest for _, rows in parts)
    sizes = [sum(len(rows) for share, rows in parts if share == index) for index in range(shares)]
    assert max(sizes) - min(sizes) <= 1


def test_jobs_run_at_once_in_their_order():
    barrier = threading.Barrier(3)
    assert run_at_once([lambda i=i: (barrier.wait(5), i)[1] for i in range(3)]) == [0, 1, 2]


def test_an_id_that_the_tokenizer_does_not_have_is_refused(engine, word_policy):
    policy = AutoModelForCausalLM.from_pretrained(word_policy).eval()
    tokenizer = AutoTokenizer.from_pretrained(word_policy)
    sampler = EngineSampler([probe_policy_server(engine.url, 5)], 5)
    engine.faults = [change(token_ids=[30, 1], logprobs={"token_logprobs": [-1.0, -1.0]})]
    with pytest.raises(UserError, match="the engine sampled the id 30, which the policy's tokenizer lacks"):
        sampler(policy, tokenizer, PROMPTS, torch.zeros(5, 6))
