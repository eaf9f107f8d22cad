"""`rlhf doctor`: check a stage before it runs.

In: stage configs.
Out: findings on the keys, the inputs, the tokenizer and its chat template, a batch of data, the memory, and
how the model may be batched; and the number of errors. Only a small model is loaded.
"""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.artifacts import hub
from pipeline.artifacts.files import list_files
from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.config import OBJECTIVES, PPOStage, Reward, StageConfig
from pipeline.data.records import open_records
from pipeline.data.schema import KINDS
from pipeline.errors import UserError, explain_row, one_line
from pipeline.evaluate.rewards import named_rewards
from pipeline.models.chat import encode_turn, prompt_ids, split_response
from pipeline.models.loading import load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.ppo.critic_source import open_critic, source_kind
from pipeline.reward.dataset import check_records
from pipeline.reward.functions import require_reward
from pipeline.reward.steps import read_steps
from pipeline.tools.doctor import memory
from pipeline.tools.doctor.engines import check_engine, describe_servers
from pipeline.tools.doctor.plans import Recipe, plan_stage, reachable_commit, stage_arguments
from pipeline.tools.doctor.small_models import check_model

RECORD_KINDS = {"sft": "demonstrations", "ppo": "prompts", "evaluate": "prompts"}  # what a stage reads
BATCH_ROWS = 64
GB = 1e9
CUDA_CONTEXT = 0.5 * GB  # what a process takes on a GPU before its first tensor
ERROR = "error: "  # the start of a finding that is wrong

Finding = tuple[str, str]  # what was checked, and the result


def examine(
    config: StageConfig, recipe: Recipe, device_memory: float | None, shards: int = 1
) -> tuple[list[Finding], int]:
    """Return the findings on one stage, and the number of errors among them.

    `device_memory` is the memory of each device in bytes, None for this machine's. The trained model is
    split into `shards`.
    """
    _library_bytes()  # before a model is loaded
    findings = [_try("config", _check_config, config)]
    is_loadable = not findings[0][1].startswith(ERROR)
    if config.inputs:
        findings += _catch("inputs", lambda: list(_check_inputs(config, recipe)))
        findings += _catch("tokenizer", lambda: list(_check_tokenizer(config)))
        findings += _catch("batch", lambda: list(_check_batch(config)))
        if is_loadable:
            findings += _catch("memory", lambda: list(_check_memory(config, recipe, device_memory, shards)))
        findings += _catch("engine", lambda: list(_check_engines(config)))
        findings += _catch("model", lambda: list(check_model(config)))
    return findings, sum(text.startswith(ERROR) for _, text in findings)


def _catch(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return what a check found, or its error as one line: after any error the other checks still run."""
    try:
        return check()
    except UserError as error:
        return [(name, f"{ERROR}{error}")]
    except Exception as error:
        return [(name, f"{ERROR}{type(error).__name__}: {one_line(error)}")]


def _try(name: str, check: Callable[..., str], *args: Any) -> Finding:
    """Return the one finding of a check, or its error."""
    return _catch(name, lambda: [(name, check(*args))])[0]


def _check_config(config: StageConfig) -> str:
    import_module(f"pipeline.{config.stage}.stage").check(config)
    return "every key is known, every value allowed"


def _check_inputs(config: Any, recipe: Recipe) -> Iterator[Finding]:
    """Yield a finding for each input, and for each reward that is a model or a server."""
    inputs = [(key, getattr(config, key), kind, stage) for key, (kind, stage) in config.inputs.items()]
    rewards: dict[str, Reward] = {}
    if config.stage == "ppo":
        rewards = ppo.named_rewards(config)
    elif config.stage == "evaluate":
        rewards = named_rewards(config) | ({"scorer": config.scorer} if config.scorer else {})
    inputs += [
        (name, reward.source, "reward", "reward") for name, reward in rewards.items() if reward.is_loaded
    ]

    for name, source, kind, stage in inputs:
        if source != "scratch":
            yield _try(name, _check_input, config, recipe, source, kind, stage)
    if config.stage == "ppo" and config.critic.source:
        yield _try("critic", _check_critic, config, recipe)
    for name, reward in rewards.items():
        if reward.is_url:
            yield _try(name, _check_server, config, recipe, reward)


def _is_to_come(recipe: Recipe, source: str) -> bool:
    """Return whether a stage of the recipe will make this artifact."""
    return not Path(source).exists() and any(source == str(stage.folder) for stage in recipe.values())


def _check_input(config: StageConfig, recipe: Recipe, source: str, kind: str, stage: str) -> str:
    if _is_to_come(recipe, source):
        return f"{source}: not made yet; {config.make_command(stage)} makes it"
    if hub.is_hub_id(source):
        commit = reachable_commit(source)
        return f"{source}: at {commit}" if commit else f"{source}: on the hub, which cannot be reached"
    return _describe(require_artifact(source, kind, config.make_command(stage) if stage else "name another"))


def _check_critic(config: PPOStage, recipe: Recipe) -> str:
    """Check what the critic starts from, against the policy if that is there."""
    source, policy = config.critic.source or "", config.policy or ""
    if _is_to_come(recipe, source) or _is_to_come(recipe, policy) or hub.is_hub_id(source):
        return _check_input(config, recipe, source, source_kind(source), "ppo")
    return _describe(open_critic(config, require_artifact(policy, "policy", config.make_command("sft"))))


def _describe(opened: Artifact) -> str:
    source = opened.path
    origin = "external" if opened.is_external else "as its stage wrote them"
    return f"{source}: {len(list_files(opened.path))} files, {origin}"


def _check_server(config: Any, recipe: Recipe, reward: Reward) -> str:
    if reward.reads and _is_to_come(recipe, reward.reads):
        return f"{reward.source}: reads {_check_input(config, recipe, reward.reads, 'reward', 'reward')}"
    opened = require_reward(reward, config.make_command("reward"), config.trust_remote_code)
    served = opened.manifest["served"]
    return f"{reward.source}: {served['engine']} serves {served['model']}, encoded as for {opened.path}"


def _check_engines(config: Any) -> Iterator[Finding]:
    """Yield how the servers of `rollouts:` are started, and a finding for each of them."""
    if config.stage != "ppo" or config.rollouts is None:
        return
    yield "engine", describe_servers(config)
    prompt = min(config.max_prompt_tokens, longest_prompt(config) or 0)
    longest = prompt + stage_arguments(config).response_tokens
    for url in config.rollouts.url:
        yield _try("engine", check_engine, config, url, longest)


def _check_tokenizer(config: Any) -> Iterator[Finding]:
    if tokenizer := _load_tokenizer(config):
        ids = prompt_ids(tokenizer, "Hello.")
        special = f"pad {tokenizer.pad_token!r}, EOS {tokenizer.eos_token!r}"
        yield "tokenizer", f"{len(tokenizer):,} tokens, {special}"
        yield "template", f"'Hello.' renders as {tokenizer.decode(ids)!r}, {len(ids)} tokens"


def _load_tokenizer(config: Any) -> Any:
    """Load the tokenizer of the stage's first model; None if the model is not on this machine."""
    source = str(
        getattr(config, "policy", None) or getattr(config, "sft", None) or getattr(config, "model", "")
    )
    if source == "scratch" or not Path(source).exists():
        return None
    return load_tokenizer(
        source, generates=config.stage != "reward", trust_remote_code=config.trust_remote_code
    )


def _check_batch(config: Any) -> Iterator[Finding]:
    """Tokenize the prompts of the first training rows."""
    if not Path(config.records).exists() or (tokenizer := _load_tokenizer(config)) is None:
        return
    kind = RECORD_KINDS.get(config.stage) or OBJECTIVES[config.objective].kind
    rows = _open_records(config, kind)["train"]
    if not len(rows):
        raise UserError(f"{config.records}: contains no {kind} to train on")
    if config.stage == "reward":
        check_records(kind, rows)
    first = rows.select(range(min(BATCH_ROWS, len(rows))))
    limit = getattr(config, "max_prompt_tokens", None) or config.max_length
    lengths, longer = [], 0
    for number, row in enumerate(first):
        with explain_row(f"{config.records}: {kind}: row {number}"):
            lengths.append(len(prompt_ids(tokenizer, row["prompt"])))
            longer += max([lengths[-1], *_row_lengths(config, tokenizer, row)]) > limit
    whole = "prompts" if config.stage in ("ppo", "evaluate") else "prompts with their responses"
    yield (
        "batch",
        f"first {len(lengths)} of {len(rows):,} {kind}: prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{longer} {whole} over {limit} (overlong: {config.overlong})",
    )


def _row_lengths(config: Any, tokenizer: Any, row: Any) -> list[int]:
    """Return the tokens of a row's prompt with each of its responses, for the stages that read them."""
    if config.stage == "sft":
        return [sum(map(len, encode_turn(tokenizer, row["prompt"], row["completion"])))]
    if config.stage == "reward" and config.objective == "stepwise":
        text, _ = read_steps(row["completions"], config.encoding.step_separator)
        return [sum(map(len, encode_turn(tokenizer, row["prompt"], text)))]
    if config.stage == "reward":
        responses = KINDS[OBJECTIVES[config.objective].kind].responses
        assert responses, f"{config.objective} learns from responses"
        turns = (split_response(row["prompt"], response) for response in responses(row))
        return [sum(map(len, encode_turn(tokenizer, *turn))) for turn in turns]
    return []


@cache
def _library_bytes() -> float:
    """Return the memory of this process when it is first asked."""
    return float(psutil.Process().memory_info().rss)


def _open_records(config: Any, kind: str) -> Any:
    return open_records(require_artifact(config.records, "records", config.make_command("prepare")), kind)


def longest_prompt(config: Any) -> int | None:
    """Return the tokens of the longest prompt of PPO or evaluate; None if there are no records yet."""
    if config.stage not in ("ppo", "evaluate") or not Path(config.records).exists():
        return None
    if (tokenizer := _load_tokenizer(config)) is None:
        return None
    splits = _open_records(config, "prompts").values()
    return max(
        (len(prompt_ids(tokenizer, prompt)) for rows in splits for prompt in rows["prompt"]), default=None
    )


def _check_memory(
    config: StageConfig, recipe: Recipe, device_memory: float | None, shards: int
) -> Iterator[Finding]:
    plan = plan_stage(config, recipe, stage_arguments(config), longest_prompt(config))
    parts = memory.estimate(*plan, shards)
    peak = parts.pop("peak")

    on_gpu = torch.cuda.is_available()
    libraries = CUDA_CONTEXT if on_gpu or device_memory else _library_bytes()
    available = device_memory or (
        torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    )
    sizes = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items() if size)
    yield "memory", f"GB per process: libraries {libraries / GB:.2f}, {sizes}"

    total = libraries + peak
    text = f"{total / GB:.2f} of {available / GB:.1f} GB"
    yield "peak", text if total <= available else f"{ERROR}{text}: it does not fit"
