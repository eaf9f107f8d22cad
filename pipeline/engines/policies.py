"""Published policies on servers: the servers of a stage that trains nothing, and a policy brought to them."""

import os
from pathlib import Path

from pipeline.config import EngineSection
from pipeline.distributed.processes import broadcast, on_main_process
from pipeline.engines.embeddings import folder_for_servers
from pipeline.engines.policy_server import PolicyServer, check_processed_logprobs, probe_policy_server
from pipeline.engines.sampler import EngineSampler
from pipeline.engines.weights import load_adapter, new_token, reload_weights, unload_adapter
from pipeline.errors import UserError
from pipeline.models.adapters import is_adapter

START = (
    "start it with: VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve POLICY "
    "--logprobs-mode processed_logprobs, and for adapters --enable-lora --max-lora-rank R"
)


def open_servers(section: EngineSection) -> EngineSampler:
    """Return the sampler of the servers of `rollouts:`. Raises `UserError` if one does not answer."""
    servers = [probe_policy_server(url, section.timeout) for url in section.url]
    for server in servers:
        check_processed_logprobs(server, section.timeout)
    return EngineSampler(servers, section.timeout, rank=int(os.environ.get("RANK", "0")))


def bring_policy(sampler: EngineSampler, folder: str, name: str, scratch: str | None = None) -> None:
    """Have all servers sample from a published policy: an adapter, whose name begins so, or a whole model.

    The name is new, since a server keeps the keys and values of an adapter by its name and path. All ranks
    call it, and rank 0 talks to the servers, which must see the folder, and `scratch` (by default its
    parent). The next call of the sampler compares them with the policy. Raises `UserError`.
    """
    path = Path(folder).resolve()
    is_one, old = is_adapter(folder), sampler.model
    new = broadcast(f"{name}-{new_token()}")

    def bring() -> None:
        for server in sampler.servers:
            if is_one and server.lora:
                load_adapter(server, path, new, sampler.timeout)
            elif not is_one and server.reload:
                with folder_for_servers(path, Path(scratch or path.parent)) as whole:
                    reload_weights(server, whole, new, sampler.timeout)
            else:
                raise UserError(f"{server.url}: {_refusal(server, is_one)} for {folder}; {START}")
            if old is not None:
                unload_adapter(server, old, sampler.timeout)

    on_main_process(bring)
    sampler.model, sampler.version = (new, sampler.version) if is_one else (None, new)
    sampler.has_new_weights = True


def _refusal(server: PolicyServer, is_one: bool) -> str:
    what = "accepts no LoRA adapters" if is_one else "loads no new weights"
    return f"serves {server.path}, but {what}"
