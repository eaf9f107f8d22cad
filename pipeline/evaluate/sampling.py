"""Responses of the policies to test prompts, and their scores."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage
from pipeline.data.records import open_records
from pipeline.distributed.processes import map_across_processes
from pipeline.distributed.progress import progress_bar
from pipeline.errors import UserError
from pipeline.models.generation import Responses, sample_responses
from pipeline.models.loading import load_sampler
from pipeline.models.logprobs import response_logprobs
from pipeline.ppo.functional import sequence_kl
from pipeline.reward.evaluation import held_out_split
from pipeline.reward.functions import RewardFunction, call_reward_function
from pipeline.training.arguments import load_options


def load_test_prompts(config: EvaluateStage, records: Artifact) -> Dataset:
    prompts = held_out_split(open_records(records, "prompts"))
    if not len(prompts):
        raise UserError(
            f"{records.path}: holds no prompts that were held out; set 'splits.test' of prepare above 0 and run it again"
        )
    return prompts.select(range(min(config.prompts, len(prompts))))


def sample_policies(
    config: EvaluateStage, inputs: dict[str, Artifact], prompts: Dataset
) -> dict[str, dict[str, list[Any]]]:
    """Answers in columns, a prompt's samples together: `best_of` from SFT, and `samples_per_prompt` with their KL to SFT from PPO: `ppo_N`
    after N steps, then `ppo`."""
    sft, tokenizer = load_sampler(str(inputs["sft"].path), **load_options(config, inputs["sft"].revision))
    sampled = {"sft": sample_policy(config, "sft", sft, tokenizer, prompts["prompt"][:], config.best_of)}
    ppo = inputs["ppo"]
    kept = {
        f"ppo_{int(folder.name.removeprefix('step-'))}": folder
        for folder in sorted(ppo.path.glob("policies/step-*"))
    }
    for name, folder in (kept | {"ppo": ppo.path}).items():
        policy, tokenizer = load_sampler(str(folder), **load_options(config, ppo.revision))
        sampled[name] = sample_policy(
            config, name, policy, tokenizer, prompts["prompt"][:], config.samples_per_prompt, reference=sft
        )
        del policy  # before the next one comes
    return sampled


def sample_policy(
    config: EvaluateStage, name: str, policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], per_prompt: int,
    reference: Any = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """Columns prompt, text, ids, response_tokens, ended, and kl where there is a `reference`; `per_prompt` rows for each prompt."""
    wanted = [prompt for prompt in prompts for _ in range(per_prompt)]
    given = {
        name: getattr(config, name)
        for name in ("seed", "temperature", "response_tokens", "max_prompt_tokens", "batch_size")
    }

    def share(rows: Sequence[int]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for answers in _with_progress(
            name, len(rows), sample_responses(policy, tokenizer, [wanted[row] for row in rows], rows, **given)
        ):
            columns = {
                "text": answers.texts,
                "ids": answers.token_lists(),
                "response_tokens": answers.response_mask.sum(1).tolist(),
            }
            columns["ended"] = answers.ended
            if reference is not None:
                columns["kl"] = response_kl(policy, reference, answers, config.temperature)
            found += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return found

    drawn = map_across_processes(share, range(len(wanted)))
    return {"prompt": wanted} | {name: [row[name] for row in drawn] for name in drawn[0]}


def _with_progress(name: str, total: int, batches: Iterable[Responses]) -> Iterator[Responses]:
    """The batches, with a bar of this process's answers and tokens on the terminal of rank 0."""
    tokens = 0
    with progress_bar(name, "answers", total=total) as shown:
        for answers in batches:
            yield answers
            tokens += int(answers.response_mask.sum())
            shown.update(len(answers.texts))
            if elapsed := shown.format_dict["elapsed"]:
                shown.set_postfix({"tokens/s": f"{tokens / elapsed:,.0f}"})


@torch.inference_mode()
def response_kl(policy: Any, reference: Any, answers: Responses, temperature: float) -> list[float]:
    """log p − log q summed over each answer: a sample of KL(policy ‖ reference) in nats."""
    tensors = (answers.query_ids, answers.query_mask, answers.response_ids, answers.response_mask)
    logprobs = (response_logprobs(model, *tensors, temperature).logprobs for model in (policy, reference))
    return sequence_kl(*logprobs).tolist()


def score_samples(scorer: RewardFunction, answers: dict[str, list[Any]], prompts: Dataset) -> list[float]:
    """Called as PPO calls it: by TRL's signature, with the other columns of each prompt's record."""
    repeats = len(answers["text"]) // len(prompts)

    def share(rows: Sequence[int]) -> list[float]:
        records = prompts.select([row // repeats for row in rows])[:]
        texts, ids, ended = ([answers[name][row] for row in rows] for name in ("text", "ids", "ended"))
        return call_reward_function(scorer, records.pop("prompt"), texts, ids, ended, records)

    return map_across_processes(share, range(len(answers["text"])))
