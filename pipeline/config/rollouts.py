"""The section `rollouts:`: an inference engine that samples the responses, instead of the stage itself."""

from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.config.base import StrictModel
from pipeline.config.values import check_server_url


class EngineSection(StrictModel):
    """Servers that sample the responses. Where they are, and how they get new weights, changes no result."""

    engine: Literal["vllm"] = "vllm"
    """The servers' engine."""

    url: list[str] = Field(min_length=1, exclude=True)
    """URL of a server, such as `http://localhost:8000`, or a list to share the prompts out over."""

    folder: str | None = Field(None, exclude=True)
    """Folder that this machine and the servers see, for new weights; null is in the run's work folder."""

    timeout: float = Field(600.0, gt=0, le=86_400, exclude=True)
    """Seconds that a request to a server may take, with all its tries."""

    @field_validator("url", mode="before")
    @classmethod
    def as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def check_url(cls, value: list[str]) -> list[str]:
        urls = [check_server_url("url", url, "POLICY") for url in value]
        if len(set(urls)) < len(urls):
            raise ValueError(f"url: {max(urls, key=urls.count)} is named twice")
        return urls


class RolloutsSection(EngineSection):
    """PPO's sampling by servers, which get the policy of each step before it is sampled."""

    sync: Literal["auto", "adapter", "folder", "nccl"] = Field("auto", exclude=True)
    """How new weights get there: a LoRA adapter, a folder to load again, or NCCL; `auto` is `adapter` under
    LoRA, else `folder`."""

    def check_stage(self, algorithm: str, is_lora: bool, is_merged_first: bool) -> None:
        """Raise `ValueError` if these servers cannot sample for a PPO stage."""
        if algorithm != "ppo":
            raise ValueError(
                f"'rollouts:' is only read with algorithm: ppo; TRL's trainer of {algorithm} samples itself; "
                "remove it"
            )
        if is_lora and self.sync in ("folder", "nccl"):
            raise ValueError(
                f"rollouts.sync: {self.sync} sends whole models, and under LoRA only an adapter is trained; "
                "set sync: auto"
            )
        if not is_lora and self.sync == "adapter":
            raise ValueError(
                "rollouts.sync: adapter needs a policy that is trained with LoRA; add a 'lora:' section, or "
                "set sync: auto"
            )
        if is_lora and is_merged_first:
            raise ValueError(
                "rollouts with adapter: merge and a 'lora:' section: the adapter's base exists in memory "
                "only, so that no server has it; run sft with merge: true, and start from what it publishes"
            )
