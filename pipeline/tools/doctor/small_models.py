"""Load the model of a stage if it is small, and ask it how it may be batched."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftConfig

from pipeline.models.loading import is_adapter, load_classifier, load_policy, load_tokenizer
from pipeline.models.positions import max_positions
from pipeline.models.probes import describe_sampling, reads_padding
from pipeline.models.probing import unwrap
from pipeline.reward import stage as reward
from pipeline.reward.probes import supports_padding
from pipeline.reward.settings import RewardSettings
from pipeline.sft.stage import check_length

MAX_BYTES = 1e9  # of the weights on disk; larger models are not loaded
WEIGHTS = ("*.safetensors", "*.bin")


def check_model(config: Any) -> Iterator[tuple[str, str]]:
    """Yield a finding on the model that the stage trains, if it is in a folder and small.

    Raises the `UserError` with which the stage would refuse it.
    """
    source = str(getattr(config, "policy", None) or getattr(config, "model", ""))
    if config.stage == "evaluate" or not _is_small(source):
        return
    options = {"trust_remote_code": config.trust_remote_code}
    if config.stage == "reward":
        yield "model", _describe_classifier(config, source, options)
        return

    policy = load_policy(source, load_tokenizer(source, **options), **options)
    if config.stage == "sft":
        check_length(config, policy)
    elif config.algorithm != "ppo":
        from pipeline.ppo.trl_trainers import require_plain_batches  # takes seconds to import

        require_plain_batches(config.algorithm, policy)
    yield "model", _describe_policy(policy)


def _is_small(source: str) -> bool:
    """Return whether a folder's weights, with those of an adapter's base, are less than `MAX_BYTES`."""
    folder = Path(source)
    if not folder.is_dir():
        return False
    size = sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))
    if is_adapter(source):
        return size < MAX_BYTES and _is_small(str(PeftConfig.from_pretrained(source).base_model_name_or_path))
    return 0 < size < MAX_BYTES


def _describe_policy(policy: Any) -> str:
    way = describe_sampling(policy)
    batches = "prompts of any lengths" if way.padding else "prompts of one length"
    cache = "with" if way.cache else "without"
    rows = "together" if reads_padding(policy) else "one by one"
    return f"{_shown(policy)}; generates for {batches}, {cache} a cache; reads rows {rows}"


def _describe_classifier(config: Any, source: str, options: dict[str, Any]) -> str:
    tokenizer = load_tokenizer(source, generates=False, **options)
    options |= {"auto_class": RewardSettings(objective=config.objective).auto_class}
    model = load_classifier(source, tokenizer, head={}, **options)  # with the outputs that it has
    padding = supports_padding(model, config.max_length, source)
    reward.choose_encoding(config, model, tokenizer)
    return f"{_shown(model)}; a batch has rows of {'any lengths' if padding else 'one length'}"


def _shown(model: Any) -> str:
    positions = max_positions(model)
    limit = "any number of" if positions is None else f"{positions:,}"
    return f"{type(unwrap(model)).__name__} reads {limit} tokens"
