"""A server that has kept earlier weights is told from the engine's rounding."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.engines.policy_server import PolicyServer, probe_policy_server, request_logprobs
from pipeline.engines.sampler import EngineSampler
from pipeline.engines.weight_probe import Seen, WeightProbe, applied_share
from pipeline.engines.weights import WeightSync
from pipeline.errors import UserError
from tests.engines.stand_in import stand_in

SERVER = PolicyServer("http://h:1", "base", "/m")
ASK = "pipeline.engines.weight_probe.request_logprobs"


def seen(policy, server):
    """Return what is seen after one row: log-probabilities of the ids 0 and 1."""
    values = {(0, token): value for token, value in enumerate(server)}
    return Seen(torch.tensor([policy], dtype=torch.float64), values)


def test_the_share_is_the_projection_of_the_servers_change_on_the_policys():
    before = seen([-1.0, -2.0], [-1.0, -2.0])
    assert applied_share(before, seen([-2.0, -4.0], [-2.0, -4.0])) == 1.0
    assert applied_share(before, seen([-2.0, -4.0], [-1.5, -3.0])) == 0.5
    # Δt = (-1, -2), Δs = (1, -1): (-1 + 2) / 5
    assert applied_share(before, seen([-2.0, -4.0], [0.0, -3.0])) == pytest.approx(0.2)
    assert applied_share(before, before) is None


@given(st.floats(-0.5, 0.5), st.floats(-5, 0), st.floats(0.1, 5))
def test_a_constant_difference_of_engine_and_policy_does_not_change_the_share(gap, start, change):
    before = seen([start, start - 1], [start + gap, start - 1 + gap])
    after = seen([start - change, start - 1], [start - change + gap, start - 1 + gap])
    # rms Δt = change / √2, rms (s - t) = |gap|
    expected = None if change / 2**0.5 < 2 * abs(gap) else pytest.approx(1.0)
    assert applied_share(before, after) == expected


@pytest.fixture
def policy(word_policy):
    return AutoModelForCausalLM.from_pretrained(word_policy).eval()


class Served:
    """A server whose log-probabilities are those of a model in some dtype."""

    def __init__(self, monkeypatch, probe, dtype):
        self.probe, self.dtype = probe, dtype
        monkeypatch.setattr(ASK, lambda *_: self.top)

    def take(self, policy):
        logprobs = self.probe.read_policy(copy.deepcopy(policy).to(self.dtype))
        self.top = [{int(i): float(row[i]) for i in row.topk(20).indices} for row in logprobs]


@pytest.mark.parametrize(
    ("dtype", "learning_rate"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-4), (torch.bfloat16, 1e-2)]
)
def test_steps_of_an_optimizer_are_followed_and_a_server_that_stays_is_an_error(
    dtype, learning_rate, policy, monkeypatch
):
    probe = WeightProbe(policy, [], 60)
    generator = torch.Generator().manual_seed(0)
    server, optimizer = (
        Served(monkeypatch, probe, dtype),
        torch.optim.Adam(policy.parameters(), learning_rate),
    )

    def check_and_step():
        probe.check(SERVER, None, probe.read_policy(policy), 1)
        ids = torch.randint(32, (4, 17), generator=generator)
        policy(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def stay_behind():
        while True:  # ends at the first step that is above the rounding
            check_and_step()

    for _ in range(8):
        server.take(policy)
        check_and_step()
    with pytest.raises(UserError, match=r"follows -?\d+% of the policy's last updates, expected 100%|differ"):
        stay_behind()


def test_a_server_that_loads_a_part_of_an_update_is_an_error(policy, monkeypatch):
    probe = WeightProbe(policy, [], 60)
    server = Served(monkeypatch, probe, torch.float32)
    server.take(policy)
    probe.check(SERVER, None, probe.read_policy(policy), 1)
    part = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    part.load_state_dict(policy.state_dict() | {"lm_head.weight": part.lm_head.weight.clone()})
    server.take(part)
    with pytest.raises(UserError, match=r"differ from the policy's by 0.0\d+ nats, expected below 0.001: "):
        probe.check(SERVER, None, probe.read_policy(policy), 1)


def test_updates_within_the_rounding_add_up(policy, monkeypatch):
    probe = WeightProbe(policy, [], 3)
    start = torch.full((16, 32), -3.0, dtype=torch.float64)
    monkeypatch.setattr(ASK, lambda *_: [{5: -2.9, 6: -2.9}] * 16)
    for change in (0.0, 0.05, 0.1, 0.15, 0.19):
        probe.check(SERVER, None, start - change, 1)
    with pytest.raises(UserError, match=r"^http://h:1: it follows 0% of the policy's last updates, expected"):
        probe.check(SERVER, None, start - 0.21, 1)


def test_a_server_of_another_model_is_refused_at_once(policy, monkeypatch):
    probe = WeightProbe(policy, [], 3)
    monkeypatch.setattr(ASK, lambda *_: [{5: -1.0, 6: -3.0}] * 16)
    with pytest.raises(
        UserError, match=r"32 tokens differ from the policy's by 1 nats, expected below 1: it"
    ):
        probe.check(SERVER, None, torch.full((16, 32), -2.0), 1)


def test_only_tokens_that_were_seen_before_are_compared():
    before = Seen(torch.tensor([[-1.0, -2.0, -3.0]]), {(0, 0): -1.0, (0, 1): -2.0})
    now = Seen(torch.tensor([[-2.0, -9.0, -3.5]]), {(0, 0): -1.25, (0, 2): -3.5})
    assert applied_share(before, now) == 0.25
    assert applied_share(before, Seen(now.policy, {(0, 2): -3.5})) is None


def test_the_probe_has_no_id_that_is_forbidden(policy):
    probe = WeightProbe(policy, range(4, 32), 60)
    assert {token for row in probe.rows for token in row} == {0, 1, 2, 3}
    assert [len(row) for row in probe.rows] == [18] * 16
    assert [len(row) for row in WeightProbe(policy, [], 5).rows] == [5] * 16


def test_a_server_that_says_that_it_took_the_weights_and_did_not_is_an_error(policy, word_policy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(word_policy)
    with stand_in(word_policy) as server:
        found = probe_policy_server(server.url, 5)
        sampler = EngineSampler([found], 5, WeightSync([found], "folder", tmp_path, 5))
        for step in range(3):
            if step == 2:
                server.takes_weights = False
            sampler.update(step, policy.save_pretrained)
            sample = [policy, tokenizer, [[3, 4]], torch.zeros(1, 2)]
            if step < 2:
                sampler(*sample)
            else:
                with pytest.raises(UserError, match="has missed an update or a part of one; start it again"):
                    sampler(*sample)
            with torch.no_grad():
                policy.lm_head.weight.mul_(1.1)


def test_the_likeliest_ids_are_read_without_those_that_are_not_finite(word_policy, policy):
    with stand_in(word_policy) as server:
        found = SERVER._replace(url=server.url)
        (top,) = request_logprobs(found, [[3, 4]], 5)
        expected = policy(torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1)
        assert top == {int(i): pytest.approx(float(expected[i]), abs=1e-5) for i in expected.topk(20).indices}
        server.faults = [(200, reply_of([{"token_id:4": -9999.0, "token_id:7": -0.5}]))]
        assert request_logprobs(found, [[3, 4]], 5) == [{7: -0.5}]


def reply_of(top):
    return {"choices": [{"index": 0, "logprobs": {"top_logprobs": top}}]}


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": []},
        {"choices": [{"index": 0, "logprobs": None}]},
        reply_of([]),
        reply_of([{"token_id:4": -1.0}, {"token_id:5": -1.0}]),
        reply_of([{"token_id:4": 0.5}]),
        reply_of([{"w4": -1.0}]),
    ],
)
def test_a_reply_without_the_log_probabilities_is_one_line(reply, word_policy):
    with stand_in(word_policy) as server:
        server.faults = [(200, reply)]
        with pytest.raises(UserError, match=r"expected 'top_logprobs' of 1 responses of one id$"):
            request_logprobs(SERVER._replace(url=server.url), [[3, 4]], 5)
