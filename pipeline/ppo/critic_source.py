"""The critic of the `critic:` section: what it starts from is opened, checked against the policy, and loaded.

A source is a folder with a `critic.json` (`critic/` of a policy that PPO wrote), the policy itself, or an
artifact that is older than `critic.json`, whose value head is beside its weights. A model of its own may also
start from a policy or a reward model that has no critic.
"""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from peft import LoraConfig, TaskType
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts.files import hash_value, read_json
from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.artifacts.schema import CRITIC, CRITIC_FILE, VALUE_HEAD, first_fault
from pipeline.config import PPOStage
from pipeline.errors import UserError
from pipeline.models.adapters import is_adapter, read_adapter
from pipeline.models.finite import is_finite
from pipeline.models.load_errors import explain_load_errors
from pipeline.models.loading import load_tokenizer, load_trunk
from pipeline.ppo.arguments import check_shared_base
from pipeline.ppo.backbone_compat import base_identity, policy_adapter_folder
from pipeline.ppo.critic import Critic, Place, vocabulary_digest
from pipeline.reward.settings import RewardSettings
from pipeline.training.arguments import build_lora_config, check_lora

REMEDY = "name another critic.source, or remove it"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class Description(BaseModel):
    """critic.json: see `pipeline.ppo.critic.write_critic`."""

    model_config = ConfigDict(strict=True)

    on: Place
    width: Annotated[int, Field(gt=0)]
    vocabulary: str
    base: str | None = None
    source: dict[str, Any] | None = None


class SavedCritic(NamedTuple):
    """A critic in a folder, as its critic.json describes it; an older one has no vocabulary."""

    folder: Path
    on: str
    vocabulary: str | None = None
    base: str | None = None


def check_critic_section(config: PPOStage) -> None:
    """Check the arguments of the critic's adapter. Raises `UserError`."""
    if config.critic.on == "adapter":
        section = with_critic_lora(config)
        check_lora(section, "critic.lora")
        policy, critic = (build_lora_config(stage, TaskType.CAUSAL_LM) for stage in (config, section))
        check_shared_base(policy, critic)


def open_critic(config: PPOStage, policy: Artifact) -> Artifact:
    """Open `critic.source` as an input of the stage; `policy` is the opened policy.

    Raises `UserError` if it is missing or altered, has no critic that `critic.on` can start from, or one for
    another vocabulary or base.
    """
    source = config.critic.source or ""
    opened = require_artifact(source, source_kind(source), "rlhf run, or name another critic.source")
    saved = find_critic(opened.path)
    if saved is None and config.critic.on != "model":
        raise UserError(
            f"{source}: has no critic; expected the artifact of a ppo stage, or its {CRITIC}/; {REMEDY}"
        )
    if saved:
        _check_place(config, opened, saved)

    # A policy, a reward model and an older artifact have a tokenizer instead.
    vocabulary = saved.vocabulary if saved else None
    vocabulary = vocabulary or vocabulary_digest(_load_tokenizer(config, source, opened.revision))
    if vocabulary != vocabulary_digest(_load_tokenizer(config, config.policy, policy.revision)):
        raise UserError(f"{source}: its vocabulary is another than that of {config.policy}; {REMEDY}")
    if config.critic.on == "adapter" and saved and saved.base not in (None, _base_digest(config, policy)):
        raise UserError(f"{source}: its adapter is for another base than that of {config.policy}; {REMEDY}")
    return opened


def source_kind(source: str) -> str:
    """Return the kind of artifact that a `critic.source` is opened as."""
    return "critic" if (Path(source) / CRITIC_FILE).is_file() else "model"


def find_critic(folder: Path) -> SavedCritic | None:
    """Return the critic that a folder is or contains, or None.

    Raises `UserError` if its critic.json is not as PPO writes it.
    """
    for place in (folder, folder / CRITIC):
        file = place / CRITIC_FILE
        if file.is_file():
            try:
                saved = Description.model_validate(read_json(file))
                return SavedCritic(place, saved.on, saved.vocabulary, saved.base)
            except ValidationError as error:
                raise UserError(f"{file}: {first_fault(error)}; {REMEDY}") from None
    return SavedCritic(folder, "trunk") if (folder / VALUE_HEAD).is_file() else None


def load_critic(
    config: PPOStage, inputs: dict[str, Artifact], policy: Any, tokenizer: PreTrainedTokenizerBase
) -> Critic:
    """Load the critic, from `inputs["critic"]` if there is one; `policy` is the loaded policy.

    Raises `UserError` if it cannot be loaded, is of another width, or has weights that are not finite.
    """
    section, opened = config.critic, inputs.get("critic")
    saved = find_critic(opened.path) if opened else None
    parts: dict[str, Any] = {}
    if section.on == "model":
        parts["model"] = _load_model(config, opened or inputs["policy"], saved, tokenizer)
    elif saved and section.on == "adapter":
        parts = _load_adapter(saved.folder)
    elif section.lora is not None:
        parts["lora"] = build_lora_config(with_critic_lora(config), TaskType.CAUSAL_LM)
    if saved:
        model = parts.get("model", policy)
        parts["value_head"] = _load_value_head(saved.folder, model)

    source = opened or (inputs["policy"] if section.on == "model" else None)
    origin: dict[str, Any] = {
        "source": {"path": source.path.as_posix(), "identity": source.identity} if source else None
    }
    if section.on == "adapter":
        # A new adapter does not depend on what was drawn for rewards on the same backbone.
        torch.manual_seed(config.seed)
        origin["base"] = _base_digest(config, inputs["policy"])
    return Critic(section.on, learning_rate=section.learning_rate, origin=origin, **parts)


def _check_place(config: PPOStage, opened: Artifact, saved: SavedCritic) -> None:
    """Raise `UserError` if the critic was saved for another `critic.on`.

    A model of its own may also start from the policy on whose trunk the critic was, with that value head.
    """
    has_policy = saved.on == "trunk" and (
        saved.folder != opened.path or not (opened.path / CRITIC_FILE).is_file()
    )
    if saved.on != config.critic.on and not (config.critic.on == "model" and has_policy):
        raise UserError(
            f"{saved.folder}: is a critic of critic.on: {saved.on}, but critic.on is {config.critic.on}; "
            f"set critic.on: {saved.on}, or name another critic.source"
        )


def _load_model(
    config: PPOStage, source: Artifact, saved: SavedCritic | None, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """Load the trunk of a critic of its own: unquantized and in fp32, because all of it is trained."""
    folder = saved.folder if saved and saved.on == "model" else source.path
    settings = RewardSettings.load(folder)
    return load_trunk(
        str(folder),
        tokenizer,
        head=settings.head if settings else None,
        revision=source.revision,
        trust_remote_code=config.trust_remote_code,
    )


def _load_adapter(folder: Path) -> dict[str, Any]:
    lora: LoraConfig = read_adapter(str(folder), None, TaskType.CAUSAL_LM, "critic", trained=True)
    return {"lora": lora, "weights": _load_tensors(folder / ADAPTER_WEIGHTS)}


def _load_value_head(folder: Path, model: Any) -> dict[str, Tensor]:
    """Load a value head for the hidden states of `model`. Raises `UserError` if it does not fit."""
    state, width = _load_tensors(folder / VALUE_HEAD), _hidden_size(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes.keys() != {"weight", "bias"} or len(shapes["weight"]) != 2:
        raise UserError(f"{folder / VALUE_HEAD}: expected a weight and a bias; {REMEDY}")
    if shapes != {"weight": (1, width), "bias": (1,)}:
        raise UserError(
            f"{folder / VALUE_HEAD}: reads states of {shapes['weight'][1]} numbers, and the states here have "
            f"{width}: it is the critic of another model; {REMEDY}"
        )
    return state


def _hidden_size(model: Any) -> int:
    layer = model.get_output_embeddings()
    return int(model.config.get_text_config().hidden_size if layer is None else layer.weight.shape[-1])


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """Load tensors. Raises `UserError` if the file is missing or no safetensors, or has NaN or infinity."""
    if not file.is_file():
        raise UserError(f"{file.parent}: lacks {file.name}: it is no whole critic; {REMEDY}")
    with explain_load_errors(str(file), "critic"):
        tensors = load_file(file)
    if wrong := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise UserError(f"{file}: its weight {wrong[0]} is not finite (NaN or infinite); {REMEDY}")
    return tensors


def with_critic_lora(config: PPOStage) -> PPOStage:
    """Return the config with the arguments of the critic's adapter as its `lora:` section."""
    lora = config.lora if config.critic.lora is None else config.critic.lora
    return config.model_copy(update={"lora": lora})


def _base_digest(config: PPOStage, policy: Artifact) -> str:
    """Return what the adapters of two runs have in common if and only if their bases are equal."""
    if config.adapter == "merge" and is_adapter(policy.path, policy.revision):
        return hash_value(policy.identity)
    return hash_value(base_identity(policy, policy_adapter_folder(policy)))


def _load_tokenizer(config: PPOStage, source: str | None, revision: str | None) -> PreTrainedTokenizerBase:
    return load_tokenizer(source or "", revision=revision, trust_remote_code=config.trust_remote_code)
