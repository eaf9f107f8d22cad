"""What a sampler by servers asks of a policy, without the policy's weights."""

from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, GenerationConfig

from pipeline.artifacts import hub
from pipeline.models.adapters import is_adapter, read_adapter
from pipeline.models.load_errors import explain_load_errors


class PolicyOutline(NamedTuple):
    """A policy's config, its generation config, and the device of the responses."""

    config: Any
    generation_config: GenerationConfig
    device: torch.device = torch.device("cpu")


def read_outline(source: str, revision: str | None = None) -> PolicyOutline:
    """Read the outline of a policy's folder or hub id; that of an adapter has its base's config.

    Raises `UserError` if it has no config.
    """
    base, base_revision = source, revision
    if is_adapter(source, revision):
        adapter = read_adapter(source, revision, None, "policy")
        base, base_revision = str(adapter.base_model_name_or_path), adapter.revision
    with explain_load_errors(base, "causal language model"):
        config = AutoConfig.from_pretrained(base, revision=base_revision, trust_remote_code=False)
        owner, owner_revision = base, base_revision
        if hub.fetch_file(source, "generation_config.json", revision):
            owner, owner_revision = source, revision
        if hub.fetch_file(owner, "generation_config.json", owner_revision):
            options: dict[str, Any] = {"revision": owner_revision}
            return PolicyOutline(config, GenerationConfig.from_pretrained(owner, **options))
        return PolicyOutline(config, GenerationConfig.from_model_config(config))
