"""`rlhf doctor`: a config looked at before anything loads: its keys, its inputs, tokenizer and template, a batch of its data, its memory.

In: stage configs. Out: a page of text, and how many things are wrong.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.artifacts import hub
from pipeline.artifacts.files import list_files
from pipeline.artifacts.inputs import require_artifact
from pipeline.config import OBJECTIVES, Reward, StageConfig
from pipeline.data.records import open_records
from pipeline.errors import UserError
from pipeline.models.chat import prompt_ids
from pipeline.models.loading import load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.reward.functions import require_reward
from pipeline.tools.doctor import memory
from pipeline.tools.doctor.plans import Recipe, plan_stage, reachable_commit, stage_arguments

FEEDS = {"sft": "demonstrations", "ppo": "prompts", "evaluate": "prompts"}

GB = 1e9

CUDA_CONTEXT = 0.5 * GB  # what a process takes on a GPU before its first tensor


def examine(
    config: StageConfig, recipe: Recipe, device_memory: float | None, shards: int = 1
) -> tuple[list[tuple[str, str]], int]:
    """((what was looked at, what was found) …, number of errors) of one stage; `device_memory` in bytes, of each of the devices that hold a
    shard of what is trained."""
    found: list[tuple[str, str]] = []
    looks = [_config, _inputs, _tokenizer, _batch] if config.inputs else [_config]
    for look in looks:
        found += _safely(look.__name__.strip("_"), lambda look=look: list(look(config, recipe)))
    if config.inputs and not found[0][1].startswith("error: "):
        found += _safely("memory", lambda: list(_memory(config, recipe, device_memory, shards)))
    return found, sum(text.startswith("error: ") for _, text in found)


def _config(config: StageConfig, recipe: Recipe) -> Iterator[tuple[str, str]]:
    from importlib import import_module

    yield _try(
        "config",
        lambda: (
            import_module(f"pipeline.{config.stage}.stage").check(config)
            or "every key is known, every value allowed"
        ),
    )


def _inputs(config: Any, recipe: Recipe) -> Iterator[tuple[str, str]]:
    named = [(key, getattr(config, key), kind, maker) for key, (kind, maker) in config.inputs.items()]
    given = (
        ppo.named_rewards(config)
        if config.stage == "ppo"
        else {"scorer": config.scorer}
        if getattr(config, "scorer", None)
        else {}
    )
    named += [(name, reward.source, "reward", "reward") for name, reward in given.items() if reward.is_loaded]
    for key, source, kind, maker in named:
        if source != "scratch":
            yield _try(
                key, lambda source=source, kind=kind, maker=maker: _input(config, recipe, source, kind, maker)
            )
    for name, reward in given.items():
        if reward.is_url:
            yield _try(name, lambda reward=reward: _remote(config, recipe, reward))


def _is_to_come(recipe: Recipe, source: str) -> bool:
    return not Path(source).exists() and any(source == str(stage.folder) for stage in recipe.values())


def _input(config: StageConfig, recipe: Recipe, source: str, kind: str, maker: str) -> str:
    if _is_to_come(recipe, source):
        return f"{source}: not made yet; {config.make_command(maker)} makes it"
    if hub.is_hub_id(source):
        commit = reachable_commit(source)
        return (
            f"{source}: at {commit}" if commit else f"{source}: on the hub, which cannot be asked from here"
        )
    opened = require_artifact(source, kind, config.make_command(maker) if maker else "name another")
    return f"{source}: {len(list_files(opened.path))} files, {'foreign' if opened.is_external else 'as its stage wrote them'}"


def _remote(config: Any, recipe: Recipe, reward: Reward) -> str:
    if reward.reads and _is_to_come(recipe, reward.reads):
        return f"{reward.source}: reads {_input(config, recipe, reward.reads, 'reward', 'reward')}"
    opened = require_reward(reward, config.make_command("reward"), config.trust_remote_code)
    return f"{reward.source}: {opened.manifest['served']['engine']} serves {opened.manifest['served']['model']}, read as {opened.path}"


def _tokenizer(config: Any, recipe: Recipe) -> Iterator[tuple[str, str]]:
    if tokenizer := _load_tokenizer(config):
        ids = prompt_ids(tokenizer, "Hello.")
        text = f"{len(tokenizer):,} tokens, pad {tokenizer.pad_token!r}, EOS {tokenizer.eos_token!r}"
        yield "tokenizer", text
        yield "template", f"'Hello.' is {tokenizer.decode(ids)!r}, {len(ids)} tokens"


def _load_tokenizer(config: Any) -> Any:
    """The tokenizer of what the stage starts from, where it is on this machine."""
    source = str(
        getattr(config, "policy", None) or getattr(config, "sft", None) or getattr(config, "model", "")
    )
    if source == "scratch" or not Path(source).exists():
        return None
    return load_tokenizer(
        source, generates=config.stage != "reward", trust_remote_code=config.trust_remote_code
    )


def _batch(config: Any, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The first rows to train on, tokenised."""
    if not Path(config.records).exists() or (tokenizer := _load_tokenizer(config)) is None:
        return
    kind = FEEDS.get(config.stage) or OBJECTIVES[config.objective].kind
    rows = open_records(require_artifact(config.records, "records", config.make_command("prepare")), kind)[
        "train"
    ]
    if not len(rows):
        raise UserError(f"{config.records}: holds no {kind} to train on")
    prompts = [len(prompt_ids(tokenizer, row["prompt"])) for row in rows.select(range(min(64, len(rows))))]
    most = getattr(config, "max_prompt_tokens", None) or config.max_length
    over = sum(length > most for length in prompts)
    yield (
        "batch",
        f"of {len(rows):,} {kind} the first {len(prompts)}: prompts of {min(prompts)} to {max(prompts)} tokens, {over} over {most}",
    )


def longest_prompt(config: Any) -> int | None:
    """Tokens of the longest prompt that PPO will answer, where its records are there."""
    if (
        config.stage not in ("ppo", "evaluate")
        or not Path(config.records).exists()
        or (tokenizer := _load_tokenizer(config)) is None
    ):
        return None
    splits = open_records(
        require_artifact(config.records, "records", config.make_command("prepare")), "prompts"
    ).values()
    return max(
        (len(prompt_ids(tokenizer, prompt)) for rows in splits for prompt in rows["prompt"]), default=None
    )


def _memory(
    config: StageConfig, recipe: Recipe, given: float | None, shards: int
) -> Iterator[tuple[str, str]]:
    found = memory.estimate(
        *plan_stage(config, recipe, stage_arguments(config), longest_prompt(config)), shards
    )
    on_gpu = torch.cuda.is_available()
    libraries = CUDA_CONTEXT if on_gpu or given else float(psutil.Process().memory_info().rss)
    there = given or (
        torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    )
    yield (
        "memory",
        f"of one process, in GB: libraries {libraries / GB:.2f}, "
        + ", ".join(f"{name} {size / GB:.2f}" for name, size in found.items() if size and name != "peak"),
    )
    peak = libraries + found["peak"]
    fits = "" if peak <= there else "error: "
    yield "peak", f"{fits}{peak / GB:.2f} of {there / GB:.1f} GB{'' if not fits else ': it does not fit'}"


def _try(what: str, look: Any) -> tuple[str, str]:
    return _safely(what, lambda: [(what, str(look()))])[0]


def _safely(what: str, look: Any) -> list[tuple[str, str]]:
    """What a look found, or the one thing that it tripped over: a doctor looks at what is broken, and goes on to the next."""
    try:
        return list(look())
    except UserError as error:
        return [(what, f"error: {error}")]
    except Exception as error:
        return [(what, f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}")]
