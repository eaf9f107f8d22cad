"""Send new weights to vLLM servers over NCCL, with the HTTP API of their weight transfer (vLLM 0.32).

The policy is written to a folder of this machine, and its tensors go from there through this process's GPU.
So the servers get the names of a checkpoint, also from sharded policies, and see no folder.

It has not been run on GPUs: tests check the requests, and what is broadcast, against a stand-in.
"""

import importlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.engines.policy_server import ABOUT, MAX_INFO, WRONG_SHAPE, PolicyServer
from pipeline.engines.requests import send_request
from pipeline.engines.weights import post_once, while_paused
from pipeline.errors import UserError, one_line


class Group(Protocol):
    """A NCCL group of this process, rank 0, and the workers of a server."""

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Send a tensor of rank `src` to all others."""


class NcclSender:
    """Sends the policy in a folder to a server; holds the group of each server.

    Raises `UserError` if this process has no GPU, or its environment no vLLM.
    """

    def __init__(self, timeout: float):
        if not torch.cuda.is_available():
            raise UserError("rollouts.sync: nccl needs a GPU in this machine; set sync: folder")
        if find_spec("vllm") is None:
            raise UserError(
                "rollouts.sync: nccl needs vLLM in this environment too; install it, or set sync: folder"
            )
        self.timeout, self.device = timeout, torch.device("cuda", torch.cuda.current_device())
        self.groups: dict[str, Group] = {}  # by URL

    def __call__(self, server: PolicyServer, folder: Path, version: str) -> None:
        """Bring the weights of a folder to a server, which has the `version` then. Raises `UserError`."""
        group = self.groups.get(server.url) or self._join(server)
        del self.groups[server.url]  # after an error it cannot be used again
        named = list(describe_tensors(folder))
        info = dict(zip(("names", "dtype_names", "shapes"), map(list, zip(*named, strict=True)), strict=True))

        def bring() -> None:
            post_once(server, "/start_weight_update", {}, self.timeout)
            self._beside(
                lambda: post_once(server, "/update_weights", {"update_info": info}, self.timeout),
                lambda: self._broadcast(group, folder),
                server,
            )
            post_once(server, "/finish_weight_update", {"weight_version": version}, self.timeout)
            post_once(server, "/reset_prefix_cache", {}, self.timeout)

        while_paused(server, bring, self.timeout)
        self.groups[server.url] = group

    def _join(self, server: PolicyServer) -> Group:
        """Form a group with all workers of a server."""
        size = 1 + read_world_size(server, self.timeout)
        address, port = own_address(server.url), free_port()
        info = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": size}
        self.groups[server.url] = self._beside(
            lambda: post_once(server, "/init_weight_transfer_engine", {"init_info": info}, self.timeout),
            lambda: open_group(address, port, size),
            server,
        )
        return self.groups[server.url]

    def _broadcast(self, group: Group, folder: Path) -> None:
        is_cuda = self.device.type == "cuda"
        stream = torch.cuda.current_stream() if is_cuda else None
        for tensor in read_tensors(folder):
            group.broadcast(tensor.to(self.device).contiguous(), src=0, stream=stream)
        if is_cuda:
            torch.cuda.synchronize()

    def _beside(self, request: Callable[[], None], work: Callable[[], Any], server: PolicyServer) -> Any:
        """Run `work` while a server takes a request that waits for it, and return its result.

        `work` waits for the server forever if that refuses the request, so that it has a thread of its own.
        """
        outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # each thread has its own
                outcome.put((work(), None))
            except Exception as error:  # it is raised below
                outcome.put((None, error))

        threading.Thread(target=run, daemon=True, name="NCCL").start()
        request()
        try:
            result, error = outcome.get(timeout=self.timeout)
        except queue.Empty:
            result, error = None, TimeoutError(f"no end after {self.timeout:g} s")
        if error is not None:
            raise UserError(f"{server.url}: NCCL: {one_line(error)}; start it again, or set sync: folder")
        return result


def describe_tensors(folder: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Yield the name, the dtype's name in torch, and the shape of each tensor, in the order of reading."""
    for name, tensor in _named_tensors(folder):
        yield name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def read_tensors(folder: Path) -> Iterator[Tensor]:
    """Yield the tensors of all safetensors files of a folder, on the CPU."""
    return (tensor for _, tensor in _named_tensors(folder))


def _named_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name in names:
                yield name, file.get_tensor(name)


def open_group(address: str, port: int, size: int) -> Group:
    """Join the NCCL group at an address as its rank 0, by the vLLM of this environment."""
    module = importlib.import_module("vllm.distributed.weight_transfer.nccl_common")
    place = {"master_address": address, "master_port": port, "world_size": size}
    return module.trainer_init(place)  # type: ignore[no-any-return]


def read_world_size(server: PolicyServer, timeout: float) -> int:
    """Return the number of workers of a server. Raises `UserError`."""
    reply = send_request(server.url + "/get_world_size", timeout, MAX_INFO, **ABOUT)
    with suppress(*WRONG_SHAPE):
        return int(reply.json()["world_size"])
    raise UserError(f"{server.url}: /get_world_size {reply.preview()}; expected 'world_size'")


def own_address(url: str) -> str:
    """Return the address of this machine that the host of a URL sees."""
    parts = urlsplit(url)
    family, kind, protocol, _, target = socket.getaddrinfo(
        parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
