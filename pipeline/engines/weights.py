"""Bring new weights to vLLM servers: a LoRA adapter, or the whole model from a folder that they see.

Errors: a server that does not take them raises one `UserError` with the URL, what it said and what to do.
"""

import os
import secrets
import shutil
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import LoraConfig

from pipeline.distributed.processes import broadcast, is_main_process, on_main_process
from pipeline.engines.embeddings import add_output_embeddings
from pipeline.engines.policy_server import ABOUT, FAIL_FAST, MAX_INFO, WRONG_SHAPE, PolicyServer
from pipeline.engines.requests import TRIES, Reply, send_request
from pipeline.errors import UserError

INITIAL = "default"  # version of the weights that a server was started with

# Brings the new weights of a folder to one server, under their name or version.
Bring = Callable[[PolicyServer, Path, str], None]

# Arguments of peft.LoraConfig that vLLM 0.32 refuses or does not read, by the only values that it serves.
SERVED_VALUES: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "use_bdlora": (None, {}),
    "use_qalora": (False,),
}
MAX_RANK = 512


def unserved_setting(lora: LoraConfig) -> str:
    """Return the setting of an adapter that vLLM does not serve, as `key=value`, or an empty string."""
    for key, values in SERVED_VALUES.items():
        if (value := getattr(lora, key, values[0])) not in values:
            return f"{key}={value!r}"
    rank = max([lora.r, *(lora.rank_pattern or {}).values()])
    return f"r={rank}" if rank > MAX_RANK else ""


def load_adapter(server: PolicyServer, folder: Path, name: str, timeout: float) -> None:
    """Load the LoRA adapter of a folder under a name, in place of one of that name. Raises `UserError`."""
    body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    _require(_post(server, "/v1/load_lora_adapter", body, timeout), server, f"the adapter {folder}")


def unload_adapter(server: PolicyServer, name: str, timeout: float) -> None:
    """Unload an adapter; one that the server does not have is no error."""
    _post(server, "/v1/unload_lora_adapter", {"lora_name": name}, timeout)


def reload_weights(server: PolicyServer, folder: Path, version: str, timeout: float) -> None:
    """Load the whole model of a folder in place of the weights, and forget the keys and values of the old.

    The server has the `version` then, see `check_version`. Raises `UserError`.
    """

    def bring() -> None:
        # The version is first: a server that is started again before it has the weights loses it.
        for path, body in (
            ("/update_weight_version", {"new_version": version}),
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}),
            ("/reset_prefix_cache", {}),
        ):
            _require(_post(server, path, body, timeout), server, f"{path} for the weights {folder}")

    while_paused(server, bring, timeout)


def while_paused(server: PolicyServer, work: Callable[[], None], timeout: float) -> None:
    """Run `work` while the server samples nothing; it is resumed whatever happens. Raises `UserError`."""
    try:
        _require(_post(server, "/pause", {}, timeout), server, "/pause")
        work()
    except BaseException:
        with suppress(UserError):  # the first error says more
            _post(server, "/resume", {}, min(timeout, 30), FAIL_FAST)
        raise
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
    """Brings the policy of each step to all servers, by `method`: "adapter", "folder" or "nccl".

    The new policy is written into `folder`, which nothing else may use: it holds at most the policies of two
    steps, and is removed at the end of the process. An adapter has the name of its step, so that a server
    that was started again answers 404 for it. Its path is new in each run: a server keeps the keys and values
    of an adapter by its name and path. Only rank 0 talks to the servers.
    """

    def __init__(
        self,
        servers: list[PolicyServer],
        method: str,
        folder: Path,
        timeout: float,
        send: Bring | None = None,
    ):
        self.servers, self.method, self.timeout = servers, method, timeout
        self.parent, self.folder = folder, folder / broadcast(new_token())
        self.name = ""  # of the step that all servers have
        brings = {"adapter": self._load_adapter, "folder": self._reload, "nccl": send}
        if (bring := brings.get(method)) is None:
            raise UserError(f"rollouts.sync: {method} is not supported; set sync: auto")
        self.bring: Bring = bring
        if is_main_process():
            weakref.finalize(self, shutil.rmtree, self.parent, ignore_errors=True)

    def update(self, step: int, write: Callable[[Path], None]) -> tuple[str | None, str]:
        """Bring all servers to `step`; return the adapter's name, None for a whole model, and the version.

        The version is that of the base's weights, see `check_version`. `write` publishes the policy in a
        folder; all ranks call both. Raises `UserError`.
        """
        name, is_adapter = f"step-{step:06}", self.method == "adapter"
        version = INITIAL if is_adapter else f"{self.folder.name}/{name}"
        if name != self.name:
            if not self.name and is_main_process():  # what an interrupted run has left
                shutil.rmtree(self.parent, ignore_errors=True)
            partial = self.folder / f"{name}.partial"
            write(partial)
            on_main_process(lambda: self._publish(partial, name, version))
            self.name = name
        return name if is_adapter else None, version

    def _publish(self, partial: Path, name: str, version: str) -> None:
        """Bring what was written to all servers, and remove the policy of the step before."""
        folder = partial.with_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        if self.method != "adapter":
            add_output_embeddings(folder)
        for server in self.servers:
            self.bring(server, folder, version)
        if self.name:
            shutil.rmtree(self.folder / self.name, ignore_errors=True)

    def _load_adapter(self, server: PolicyServer, folder: Path, _version: str) -> None:
        load_adapter(server, folder, folder.name, self.timeout)
        if self.name:
            unload_adapter(server, self.name, self.timeout)

    def _reload(self, server: PolicyServer, folder: Path, version: str) -> None:
        reload_weights(server, folder, version, self.timeout)


def post_once(server: PolicyServer, path: str, body: dict[str, Any], timeout: float) -> None:
    """Post what a server must not get twice. Raises `UserError` if it is not taken."""
    _require(_post(server, path, body, timeout, tries=1), server, path)


def new_token() -> str:
    """Return a name that no folder or adapter has had."""
    return secrets.token_hex(4)


def _post(server: PolicyServer, path: str, body: dict[str, Any], timeout: float, tries: int = TRIES) -> Reply:
    return send_request(server.url + path, timeout, MAX_INFO, body, tries, **ABOUT)


def _require(reply: Reply, server: PolicyServer, what: str) -> None:
    if reply.status != 200:
        raise UserError(
            f"{server.url}: does not take {what}: {reply.preview()}; expected 200: does the server see this "
            "folder? 'rlhf doctor' prints the command that starts it again"
        )
