"""Responses of the policies to test prompts, and their scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage
from pipeline.data.records import open_records
from pipeline.distributed.processes import map_across_processes
from pipeline.distributed.progress import progress_bar
from pipeline.engines.policies import bring_policy, open_servers
from pipeline.errors import UserError
from pipeline.models.ends import declared_ends
from pipeline.models.generation import Responses, sample_responses
from pipeline.models.loading import load_sampler
from pipeline.models.logprobs import response_logprobs, rows_within_budget
from pipeline.models.prompts import fit_prompts, truncation_side
from pipeline.ppo.functional import sequence_kl
from pipeline.ppo.policy_trainer import prompt_budget
from pipeline.reward.calls import RewardFunction, call_reward_function
from pipeline.reward.evaluation import held_out_split
from pipeline.reward.token_rewards import total_reward
from pipeline.training.arguments import load_options

# The keys of the config that decide a response.
SAMPLING_KEYS = ("seed", "temperature", "response_tokens", "max_prompt_tokens", "batch_size")


def load_test_prompts(
    config: EvaluateStage, records: Artifact, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return the first `config.prompts` held-out prompts, and print how many are too long.

    `tokenizer` is the policies'. Raises `UserError` if there are none, or none fits.
    """
    prompts = held_out_split(open_records(records, "prompts"))
    if not len(prompts):
        raise UserError(
            f"{records.path}: contains no held-out prompts; "
            "set 'splits.test' of prepare above 0 and run it again"
        )
    if config.overlong != "drop":
        prompts = prompts.select(range(min(config.prompts, len(prompts))))
    limits = (config.max_prompt_tokens, config.overlong, f"{records.path}: test prompts")
    prompts = fit_prompts(tokenizer, prompts, *limits)
    return prompts.select(range(min(config.prompts, len(prompts))))


def sample_policies(
    config: EvaluateStage, inputs: dict[str, Artifact], prompts: Dataset, references: int = 0
) -> dict[str, dict[str, list[Any]]]:
    """Sample responses from SFT, from each policy that ppo kept, and from the final one.

    Returns the columns of `sample_policy` by policy: `sft`, `ppo_N` after N steps, then `ppo`. SFT gives
    `best_of` responses to each prompt; the others give `samples_per_prompt`, with their KL to SFT. With
    `references`, so many more responses of SFT to each prompt are under this name.
    """
    ppo, texts = inputs["ppo"], prompts["prompt"][:]
    # PPO may have a stop token, which SFT's policy does not declare: both are sampled in the same way.
    opened = (inputs["sft"], ppo)
    ends = [end for policy in opened for end in declared_ends(str(policy.path), policy.revision)]
    sampler, scratch = None, None
    if config.rollouts is not None:
        sampler, scratch = open_servers(config.rollouts), config.rollouts.folder
    sft, tokenizer = load_sampler(str(inputs["sft"].path), **load_options(config, inputs["sft"].revision))
    if sampler is not None:
        bring_policy(sampler, str(inputs["sft"].path), "sft", scratch)
    options: dict[str, Any] = {"ends": ends, "sampler": sampler}
    per_prompt = config.best_of + references
    sampled = sample_policy(config, "sft", sft, tokenizer, texts, per_prompt, **options)
    samples = {"sft": _pick(sampled, per_prompt, range(config.best_of))}
    if references:
        samples["references"] = _pick(sampled, per_prompt, range(config.best_of, per_prompt))

    folders = {
        f"ppo_{int(folder.name.removeprefix('step-'))}": folder
        for folder in sorted(ppo.path.glob("policies/step-*"))
    }
    for name, folder in (folders | {"ppo": ppo.path}).items():
        policy, tokenizer = load_sampler(str(folder), **load_options(config, ppo.revision))
        if sampler is not None:
            bring_policy(sampler, str(folder), name, scratch)
        samples[name] = sample_policy(
            config, name, policy, tokenizer, texts, config.samples_per_prompt, reference=sft, **options
        )
        del policy  # frees its memory before the next one is loaded
    return samples


def _pick(columns: dict[str, list[Any]], per_prompt: int, places: range) -> dict[str, list[Any]]:
    """Return the rows at these places among the rows of each prompt."""
    return {
        name: [value for row, value in enumerate(column) if row % per_prompt in places]
        for name, column in columns.items()
    }


def sample_policy(
    config: EvaluateStage,
    name: str,
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    per_prompt: int,
    ends: Sequence[int] = (),
    reference: Any = None,
    sampler: Callable[..., Responses] | None = None,
) -> dict[str, list[Any]]:
    """Sample `per_prompt` responses to each prompt, in consecutive rows.

    `ends` are ids that end a response, beside those of the policy itself. `sampler` is the built-in one if it
    is None. Returns the columns prompt, text,
    ids, response_tokens and ended, and with a `reference` also kl.
    """
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    options = {key: getattr(config, key) for key in SAMPLING_KEYS}
    options |= {"side": truncation_side(config.overlong), "ends": ends, "sampler": sampler}
    room = prompt_budget(policy, config.response_tokens, config.max_prompt_tokens)
    if room < config.max_prompt_tokens:  # the policy has few positions
        fit_prompts(tokenizer, Dataset.from_dict({"prompt": prompts}), room, "truncate_left", name)
        options["max_prompt_tokens"] = room

    def sample_rows(rows: Sequence[int]) -> list[dict[str, Any]]:
        table: list[dict[str, Any]] = []
        batches = sample_responses(policy, tokenizer, [repeated[row] for row in rows], rows, **options)
        for responses in _with_progress(name, len(rows), batches):
            columns = {
                "text": responses.texts,
                "ids": responses.token_lists(),
                "response_tokens": responses.response_mask.sum(1).tolist(),
                "ended": responses.ended,
            }
            if reference is not None:
                columns["kl"] = response_kl(policy, reference, responses, config.temperature)
            table += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return table

    table = map_across_processes(sample_rows, range(len(repeated)))
    return {"prompt": repeated} | {column: [row[column] for row in table] for column in table[0]}


def _with_progress(name: str, total: int, batches: Iterable[Responses]) -> Iterator[Responses]:
    """Yield the batches, with a bar of this process's responses and tokens on the terminal of rank 0."""
    tokens = 0
    with progress_bar(name, "responses", total=total) as bar:
        for responses in batches:
            yield responses
            tokens += int(responses.response_mask.sum())
            bar.update(len(responses.texts))
            if elapsed := bar.format_dict["elapsed"]:
                bar.set_postfix({"tokens/s": f"{tokens / elapsed:,.0f}"})


@torch.inference_mode()
def response_kl(policy: Any, reference: Any, responses: Responses, temperature: float) -> list[float]:
    """Return log p − log q summed over each response: a sample of KL(policy ‖ reference) in nats."""
    tensors = (
        responses.query_ids,
        responses.query_mask,
        responses.response_ids,
        responses.response_mask,
    )
    size = rows_within_budget(policy, responses.response_ids.shape[1])
    kl: list[float] = []
    for part in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        read = partial(response_logprobs, temperature=temperature)
        kl += sequence_kl(read(policy, *part).logprobs, read(reference, *part).logprobs).tolist()
    return kl


def score_samples(scorer: RewardFunction, columns: dict[str, list[Any]], prompts: Dataset) -> list[float]:
    """Return the scores of the responses in `columns`, as `score_columns` does."""
    return score_columns(scorer, columns, prompts)["reward"]


def score_columns(
    scorer: RewardFunction, columns: dict[str, list[Any]], prompts: Dataset, names: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Score the responses in `columns` as PPO does: with the other columns of each prompt's record.

    Returns the column `reward`, and those of `names`, which the scorer passes to `log_extra`. No reward,
    None, counts 0.
    """

    def score_batch(*batch: Any) -> list[tuple[float, ...]]:
        logged: dict[str, list[float | None]] = {}
        if names:
            batch[-1]["log_extra"] = logged.__setitem__
        rewards = call_reward_function(scorer, *batch)
        parts = ([value or 0.0 for value in logged[name]] for name in names)
        return list(zip(map(total_reward, rewards), *parts, strict=True))

    table = map_samples(score_batch, columns, prompts)
    return dict(zip(("reward", *names), map(list, zip(*table, strict=True)), strict=True))


def map_samples(
    score: Callable[..., list[Any]], columns: dict[str, list[Any]], prompts: Dataset
) -> list[Any]:
    """Return what `score` returns for the responses in `columns`; each process scores its share.

    The rows of `columns` are the same number of responses to each of `prompts`, in order. `score` gets the
    prompts, the texts, their ids, whether each ended, and the other columns of the prompts' records.
    """
    repeats = len(columns["text"]) // len(prompts)

    def score_rows(rows: Sequence[int]) -> list[Any]:
        records = prompts.select([row // repeats for row in rows])[:]
        texts, ids, ended = ([columns[name][row] for row in rows] for name in ("text", "ids", "ended"))
        return score(records.pop("prompt"), texts, ids, ended, records)

    return map_across_processes(score_rows, range(len(columns["text"])))
