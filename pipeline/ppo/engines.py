"""The servers that sample PPO's rollouts: what they must serve, and the command that starts them right."""

import hashlib
import os
from pathlib import Path

from peft import LoraConfig, TaskType

from pipeline.config import PPOStage
from pipeline.engines.nccl import NcclSender
from pipeline.engines.policy_server import PolicyServer, check_processed_logprobs, probe_policy_server
from pipeline.engines.sampler import EngineSampler, Sync
from pipeline.engines.weights import WeightSync, unserved_setting
from pipeline.errors import UserError
from pipeline.models.adapters import is_adapter, read_adapter
from pipeline.training.arguments import build_lora_config, resolve_precision

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM has kernels for
LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
WEIGHTS = "weights-for-servers"  # folder in the run's work folder
RELOAD = "VLLM_SERVER_DEV_MODE=1"


def open_sampler(config: PPOStage, work: Path) -> EngineSampler:
    """Return the sampler of `rollouts:`; new weights pass through its `folder`, or one in `work`.

    Raises `UserError` if a server does not answer, or not as this run needs it.
    """
    section = config.rollouts
    assert section is not None
    servers = require_servers(config)
    sync = build_sync(servers, sync_method(config), weights_folder(config, work), section.timeout)
    return EngineSampler(servers, section.timeout, sync, rank=int(os.environ.get("RANK", "0")))


def weights_folder(config: PPOStage, work: Path) -> Path:
    """Return the folder for new weights, which no other run uses. Raises `UserError`."""
    assert config.rollouts is not None
    if config.rollouts.folder is None:
        return (work / WEIGHTS).resolve()
    shared = Path(config.rollouts.folder).resolve()
    if not shared.is_dir():
        raise UserError(f"rollouts.folder: {shared} is no folder; expected one that all servers see too")
    return shared / f"{WEIGHTS}-{hashlib.sha256(bytes(work.resolve())).hexdigest()[:8]}"


def build_sync(servers: list[PolicyServer], method: str, folder: Path, timeout: float) -> Sync:
    """Return what brings new weights to the servers by `method`: adapter, folder or nccl."""
    return WeightSync(servers, method, folder, timeout, NcclSender(timeout) if method == "nccl" else None)


def sync_method(config: PPOStage) -> str:
    """Return how new weights get to the servers: adapter, folder or nccl."""
    assert config.rollouts is not None
    automatic = "folder" if config.lora is None else "adapter"
    return automatic if config.rollouts.sync == "auto" else config.rollouts.sync


def require_servers(config: PPOStage) -> list[PolicyServer]:
    """Return the servers of `rollouts:`, each of which answers as this run needs it. Raises `UserError`."""
    assert config.rollouts is not None
    return [require_server(config, url) for url in config.rollouts.url]


def require_server(config: PPOStage, url: str) -> PolicyServer:
    """Return the server at `url`. Raises `UserError`, with the command that starts it as the run needs it."""
    assert config.rollouts is not None
    timeout = config.rollouts.timeout
    if config.lora is not None and (setting := unserved_setting(_trained_adapter(config))):
        raise UserError(f"ppo: lora.{setting}: vLLM serves no such adapter; change it, or remove 'rollouts:'")
    server = probe_policy_server(url, timeout)
    if problem := _find_problem(config, server):
        raise UserError(f"{server.url}: {problem}; start it with: {start_command(config)}")
    check_processed_logprobs(server, timeout)
    return server


def _find_problem(config: PPOStage, server: PolicyServer) -> str:
    """Return what a server lacks that gets the policy as `rollouts.sync` says, or an empty string."""
    if config.lora is not None:
        return "" if server.lora else f"serves {server.path}, but accepts no LoRA adapters"
    return "" if server.reload else f"serves {server.path}, but loads no new weights"


def base_problem(server: PolicyServer, base: str) -> str:
    """Return that a server serves another model than `base`, or an empty string.

    A path that this machine does not have cannot be compared; the first rollout's log-probabilities tell.
    """
    served, expected = Path(server.path), Path(base)
    if served.is_absolute() and not served.exists():
        return ""
    is_same = server.path == base or (expected.exists() and served.resolve() == expected.resolve())
    return "" if is_same else f"serves {server.path}, expected {base}"


def start_command(config: PPOStage) -> str:
    """Return the command that starts a server for this run on a GPU machine."""
    assert config.rollouts is not None
    dtype = DTYPES[resolve_precision(config.precision)]
    options = f"--dtype {dtype} --logprobs-mode processed_logprobs"
    if config.lora is not None:
        rank = next((size for size in RANKS if size >= _adapter_rank(config)), RANKS[-1])
        return f"{LORA} vllm serve {served_base(config)} --enable-lora --max-lora-rank {rank} {options}"
    if config.rollouts.sync == "nccl":
        options += """ --weight-transfer-config '{"backend": "nccl"}'"""
    return f"{RELOAD} vllm serve {served_base(config)} {options}"


def served_base(config: PPOStage) -> str:
    """Return the folder or hub id that servers start with: the policy, or the base of its adapter."""
    adapter = _continued(config)
    return str(adapter.base_model_name_or_path if adapter else config.policy)


def _continued(config: PPOStage) -> LoraConfig | None:
    """Return the config of the adapter that the policy is, or None if it is a model or not made yet."""
    source = config.policy or ""
    is_one = config.lora is not None and Path(source).exists() and is_adapter(source)
    return read_adapter(source, None, TaskType.CAUSAL_LM, "policy") if is_one else None


def _trained_adapter(config: PPOStage) -> LoraConfig:
    return _continued(config) or build_lora_config(config, TaskType.CAUSAL_LM) or LoraConfig()


def _adapter_rank(config: PPOStage) -> int:
    lora = _trained_adapter(config)
    return max([lora.r, *(lora.rank_pattern or {}).values()])
