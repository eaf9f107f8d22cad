"""Bring new weights to vLLM servers: a LoRA adapter, or the whole model from a folder that they see.

Errors: a server that does not take them raises one `UserError` with the URL, what it said and what to do.
"""

import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.distributed.processes import broadcast, is_main_process, on_main_process
from pipeline.engines.policy_server import ABOUT, MAX_INFO, WRONG_SHAPE, PolicyServer
from pipeline.engines.requests import Reply, send_request
from pipeline.errors import UserError

INITIAL = "default"  # version of the weights that a server was started with


def load_adapter(server: PolicyServer, folder: Path, name: str, timeout: float) -> None:
    """Load the LoRA adapter of a folder under a name, in place of one of that name. Raises `UserError`."""
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    _require(_post(server, "/v1/load_lora_adapter", body, timeout), server, f"the adapter {folder}")


def unload_adapter(server: PolicyServer, name: str, timeout: float) -> None:
    """Unload an adapter; one that the server does not have is no error."""
    _post(server, "/v1/unload_lora_adapter", {"lora_name": name}, timeout)


def reload_weights(server: PolicyServer, folder: Path, version: str, timeout: float) -> None:
    """Load the whole model of a folder in place of the weights, and forget the keys and values of the old.

    The server has the `version` then, see `check_version`. It is paused meanwhile, and resumed whatever
    happens. Raises `UserError`.
    """
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    steps: dict[str, dict[str, Any]] = {
        "/pause": {},
        "/collective_rpc": body,
        "/reset_prefix_cache": {},
        "/update_weight_version": {"new_version": version},
    }
    try:
        for path, content in steps.items():
            _require(_post(server, path, content, timeout), server, f"{path} for the weights {folder}")
    finally:
        _require(_post(server, "/resume", {}, timeout), server, "/resume")


def check_version(server: PolicyServer, version: str, timeout: float) -> None:
    """Raise `UserError` if a server has other weights: it was started again, or others loaded theirs."""
    reply = send_request(server.url + "/weight_info", timeout, MAX_INFO, **ABOUT)
    with suppress(*WRONG_SHAPE):
        if reply.json()["weight_version"] == version:
            return
    raise UserError(
        f"{server.url}: /weight_info {reply.preview()}; expected the version {version}: the server was "
        "started again, or others loaded their weights; run the same command again with a server of its "
        "own: it resumes from the last checkpoint"
    )


class WeightSync:
    """Brings the policy of each step to all servers, by `method`: "adapter" or "folder".

    An adapter has the name of its step, so that a server that was started again answers 404 for it. Its path
    is new in each run: a server keeps the keys and values of an adapter by its name and path. Only rank 0
    talks to the servers.
    """

    def __init__(self, servers: list[PolicyServer], method: str, folder: Path, timeout: float):
        if method not in ("adapter", "folder"):
            raise UserError(f"rollouts.sync: {method} is not supported; set sync: auto")
        self.servers, self.method, self.timeout = servers, method, timeout
        self.parent, self.folder = folder, folder / broadcast(new_token())
        self.name = ""  # of the step that all servers have

    def update(self, step: int, write: Callable[[Path], None]) -> tuple[str | None, str]:
        """Bring all servers to `step`; return the adapter's name, None for a whole model, and the version.

        The version is that of the base's weights, see `check_version`. `write` publishes the policy in a
        folder; all ranks call both. Raises `UserError`.
        """
        name, is_adapter = f"step-{step:06}", self.method == "adapter"
        version = INITIAL if is_adapter else f"{self.folder.name}/{name}"
        if name != self.name:
            if is_main_process():
                shutil.rmtree(self.parent, ignore_errors=True)
            write(self.folder / name)
            on_main_process(lambda: self._load(name, version))
            self.name = name
        return name if is_adapter else None, version

    def _load(self, name: str, version: str) -> None:
        for server in self.servers:
            if self.method == "folder":
                reload_weights(server, self.folder / name, version, self.timeout)
                continue
            load_adapter(server, self.folder / name, name, self.timeout)
            if self.name:
                unload_adapter(server, self.name, self.timeout)


def new_token() -> str:
    """Return a name that no folder or adapter has had."""
    return secrets.token_hex(4)


def _post(server: PolicyServer, path: str, body: dict[str, Any], timeout: float) -> Reply:
    return send_request(server.url + path, timeout, MAX_INFO, body, **ABOUT)


def _require(reply: Reply, server: PolicyServer, what: str) -> None:
    if reply.status != 200:
        raise UserError(
            f"{server.url}: does not take {what}: {reply.preview()}; expected 200: does the server see this "
            "folder? 'rlhf doctor' prints the command that starts it right"
        )
