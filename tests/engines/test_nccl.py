"""The requests of vLLM's weight transfer, and what is broadcast meanwhile, against a stand-in for both."""

import queue
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.engines import nccl
from pipeline.engines.policy_server import PolicyServer, request_logprobs
from pipeline.engines.weights import WeightSync
from pipeline.errors import UserError
from tests.engines.stand_in import POSTED, stand_in

ROUTES = {
    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
    *POSTED,
}


class Worker:
    """Stands for the server's workers: its requests wait for the trainer, as NCCL does."""

    def __init__(self, server):
        self.server, self.answer = server, server.answer
        self.sent, self.joined = queue.SimpleQueue(), queue.SimpleQueue()
        server.answer = self.take

    def open_group(self, *place):
        self.joined.put(place)
        return self

    def broadcast(self, tensor, src, stream=None):
        assert (src, stream) == (0, None)
        self.sent.put(tensor)

    def take(self, path, body):
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            place = tuple(info[key] for key in ("master_address", "master_port", "world_size"))
            assert self.joined.get(timeout=5) == place
            assert info["rank_offset"] == 1
        elif path == "/update_weights":
            info = body["update_info"]
            weights = {}
            for name, dtype, shape in zip(*info.values(), strict=True):
                weights[name] = self.sent.get(timeout=5)
                assert (weights[name].dtype, list(weights[name].shape)) == (getattr(torch, dtype), shape)
            self.server.policy.load_state_dict(weights)
        elif path == "/finish_weight_update":
            self.server.version = body["weight_version"]
        return self.answer(path, body)


@contextmanager
def served(folder, monkeypatch):
    """Yield a stand-in, its worker, and the sync of a trainer whose GPU is the CPU."""
    with stand_in(folder, posted=ROUTES) as server:
        worker = Worker(server)
        monkeypatch.setattr(nccl, "open_group", worker.open_group)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        monkeypatch.setattr(nccl, "find_spec", lambda _: True)
        sender = nccl.NcclSender(5)
        sender.device = torch.device("cpu")
        yield server, worker, sender


def test_the_server_has_the_tensors_of_each_step(word_policy, tmp_path, monkeypatch):
    policy = AutoModelForCausalLM.from_pretrained(word_policy).eval()
    with served(word_policy, monkeypatch) as (server, _, sender):
        found = PolicyServer(server.url, "base", str(word_policy))
        sync = WeightSync([found], "nccl", tmp_path / "weights", 5, sender)
        for step in (0, 2):
            with torch.no_grad():
                policy.lm_head.weight.mul_(1.1)
            name, version = sync.update(step, policy.save_pretrained)
            assert name is None
            assert server.version == version == f"{sync.folder.name}/step-{step:06}"
            ours = policy(torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1)
            (top,) = request_logprobs(found, [[3, 4]], 5)
            assert list(top.values()) == pytest.approx(ours[list(top)].tolist(), abs=1e-5)
        bodies = dict(server.asked)
        paths = [path for path, _ in server.asked if path != "/v1/completions"]
    update = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    update += ["/reset_prefix_cache", "/resume"]
    assert paths == ["/init_weight_transfer_engine", *update, *update]
    init = bodies["/init_weight_transfer_engine"]["init_info"]
    assert (init["master_address"], init["world_size"]) == ("127.0.0.1", 3)
    names = list(bodies["/update_weights"]["update_info"])
    assert names == ["names", "dtype_names", "shapes"]


def test_a_server_that_refuses_an_update_is_resumed_and_one_line(word_policy, tmp_path, monkeypatch):
    with served(word_policy, monkeypatch) as (server, _, sender):
        found = PolicyServer(server.url, "base", str(word_policy))
        server.faults = [None, None, None, (500, "no group")]
        with pytest.raises(UserError, match=r"does not take /update_weights: returned 500, 'no group'"):
            sender(found, word_policy, "v")
        assert [path for path, _ in server.asked[-2:]] == ["/update_weights", "/resume"]
        assert sender.groups == {}  # the next run joins anew


def test_a_group_that_cannot_form_is_one_line(word_policy, monkeypatch):
    with served(word_policy, monkeypatch) as (server, worker, sender):
        found = PolicyServer(server.url, "base", str(word_policy))

        def fail(*place):
            worker.joined.put(place)
            raise RuntimeError("NCCL error: unhandled system error")

        monkeypatch.setattr(nccl, "open_group", fail)
        with pytest.raises(UserError, match=rf"^{server.url}: NCCL: NCCL error: unhandled system error; sta"):
            sender(found, word_policy, "v")


def test_nccl_needs_a_gpu_and_vllm(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"^rollouts.sync: nccl needs a GPU in this machine; set sync: folder"
    ):
        nccl.NcclSender(5)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(nccl, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"^rollouts.sync: nccl needs vLLM in this environment too; install"):
        nccl.NcclSender(5)
