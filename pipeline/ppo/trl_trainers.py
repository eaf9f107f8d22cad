"""`algorithm: rloo | grpo`: TRL's own trainers with this project's reward, and the evaluation and artifact that PPO has.

TRL decodes answers without special tokens, so that one that was cut off looks like one that ended. Here the reward reads the exact
completion ids, and is what PPO's is by default: normalised by the reference sample, less `MISSING_EOS_PENALTY` for a missing EOS.
Evaluations draw with `temperature`, `top_k` and `top_p`; what else bends TRL's samples is left to training.
"""

import statistics
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.errors import UserError
from pipeline.models.chat import prompt_ids
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.callbacks import DropStaleCheckpoints
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.policy_trainer import GenerationShape, PolicyTrainer, prompt_budget
from pipeline.reward.functions import RewardFunction, RewardSource, call_reward_function

MISSING_EOS_PENALTY = PPOConfig.missing_eos_penalty

RECORD = "record"  # the one column beside the messages that TRL renders, so that no name of the user's meets one of TRL's

SET_BY_STAGE = {
    "model_init_kwargs": "policy", "trust_remote_code": "trust_remote_code", "reward_weights": "the weights of 'reward'",
    "remove_unused_columns": "nothing: the reward is given all columns", "disable_dropout": "nothing: there is no dropout",
    "chat_template_kwargs": "nothing: one template everywhere",
    "load_best_model_at_end": "nothing: best/ holds the best", "metric_for_best_model": "nothing: best/ holds the best",
}  # fmt: skip


class _RLOOConfig(RLOOConfig):
    RESERVED: ClassVar[dict[str, str]] = SET_BY_STAGE


class _GRPOConfig(GRPOConfig):
    RESERVED: ClassVar[dict[str, str]] = SET_BY_STAGE


class _RLOO(PolicyTrainer, RLOOTrainer):
    """TRL's trainer, evaluated as PPO is."""


class _GRPO(PolicyTrainer, GRPOTrainer):
    """TRL's trainer, evaluated as PPO is."""


ARGUMENTS: dict[str, type[TrainingArguments]] = {"ppo": PPOConfig, "rloo": _RLOOConfig, "grpo": _GRPOConfig}

TRAINERS: dict[str, Any] = {"rloo": _RLOO, "grpo": _GRPO}


def check_algorithm(algorithm: str, given: dict[str, Any]) -> None:
    """Refuse what TRL would trip over once it trains. Raises `UserError`."""
    unread = {"save_strategy": "best", "lr_scheduler_type": "reduce_lr_on_plateau"}
    for key, value in unread.items():
        if given.get(key) == value:
            raise UserError(
                f"ppo: training.{key}: {value} is not for algorithm: {algorithm}; best/ is kept anyway; choose another"
            )


def build_trl_trainer(
    algorithm: str, policy: Any, reward: RewardSource, args: Any, train_dataset: Dataset, processing_class: PreTrainedTokenizerBase,
    max_prompt_tokens: int, revision: str | None = None, trust_remote_code: bool = False, **watched: Any,
) -> PolicyTrainer:  # fmt: skip
    """The trainer of an algorithm. `watched` are `eval_dataset`, `callbacks`, and the attributes of a `Watched`.

    Prompts over `max_prompt_tokens` are left out, and counted. `revision` is the policy's commit, from which TRL reads the reference.
    Raises `UserError` for what TRL refuses.
    """
    tokens = prompt_budget(policy, args.max_completion_length, max_prompt_tokens)
    rows = filter_prompts(train_dataset, processing_class, tokens)
    if len(rows) < (least := args.generation_batch_size // args.num_generations):
        raise UserError(
            f"ppo: {len(rows)} prompts to train on, and algorithm: {algorithm} draws answers to {least} at a time, of which it leaves out "
            "what does not fill a batch; lower training.generation_batch_size, or raise training.num_generations"
        )
    # One EOS for all algorithms: TRL's would also end answers with others that the checkpoint declares.
    policy.generation_config.eos_token_id = processing_class.eos_token_id
    args.model_init_kwargs, args.trust_remote_code = (
        ({"revision": revision} if revision else None),
        trust_remote_code,
    )
    given = {
        "eval_dataset": watched.pop("eval_dataset"),
        "callbacks": [*watched.pop("callbacks"), DropStaleCheckpoints()],
    }
    actor = ActorCritic(
        policy, kl_coef=0.0
    )  # for the KL of evaluations: TRL drops the reference where beta is 0
    if actor.reference is not None and args.beta:
        ensure_reference_checkpoint(
            policy, Path(str(args.output_dir)) / "reference", revision, trust_remote_code
        )
    try:
        trainer: Any = TRAINERS[algorithm](
            model=policy, reward_funcs=as_reward_func(reward, processing_class), args=args, train_dataset=rows,
            processing_class=processing_class, **given,
        )  # fmt: skip
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"ppo: algorithm: {algorithm}: {' '.join(str(error).split())}") from error
    if actor.reference is not None:  # TRL's own, where it has one: the same model
        actor.reference = (
            trainer.ref_model if trainer.ref_model is not None else actor.reference.to(args.device)
        )
    actor.value_head.to(args.device)
    trainer.actor, trainer.reward, trainer.max_prompt_tokens = actor, reward, tokens
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "batch_size": args.per_device_eval_batch_size,
    }
    trainer.generation = GenerationShape(args.max_completion_length, args.num_generations_eval or 1, options)
    for name, value in watched.items():
        setattr(trainer, name, value)
    return trainer


def ensure_reference_checkpoint(
    policy: Any, folder: Path, revision: str | None, trust_remote_code: bool
) -> None:
    """TRL reads the reference from where the policy came from. Where that has fewer tokens than the tokenizer, so that the policy has
    grown, the policy is written to `folder`, and read from there."""
    there = AutoConfig.from_pretrained(
        policy.name_or_path, revision=revision, trust_remote_code=trust_remote_code
    )
    if there.get_text_config().vocab_size != policy.config.get_text_config().vocab_size:
        if is_main_process():
            policy.save_pretrained(folder)
        broadcast("written")
        policy.config._name_or_path = str(folder)


def as_reward_func(reward: RewardSource, tokenizer: PreTrainedTokenizerBase) -> RewardFunction:
    """The reward as TRL calls it, with messages for prompts and texts that do not tell whether an answer ended."""

    def reward_function(prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, log_extra: Any, log_metric: Any,
                        **columns: Any) -> list[float]:  # fmt: skip
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        texts = [
            str(tokenizer.decode(ids[: len(ids) - end], skip_special_tokens=True))
            for ids, end in zip(completion_ids, ended, strict=True)
        ]
        records = columns[RECORD]
        given = {name: [record[name] for record in records] for name in records[0]}
        raw = call_reward_function(reward.score, given.pop("prompt"), texts, completion_ids, ended, given)
        log_metric("raw_reward", statistics.fmean(raw))
        scores = [(score - reward.mean) / (reward.std or 1.0) for score in raw]
        return [score - MISSING_EOS_PENALTY * (not end) for score, end in zip(scores, ended, strict=True)]

    return reward_function


def filter_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """Rows with prompts of at most so many tokens: as messages, which TRL renders as everything here does, and as they were."""
    kept = [i for i, prompt in enumerate(rows["prompt"]) if 0 < len(prompt_ids(tokenizer, prompt)) <= tokens]
    if not kept:
        raise UserError(
            f"ppo: none of the {len(rows)} prompts has 1 to {tokens} tokens; raise max_prompt_tokens, or shorten the answers"
        )
    if len(kept) < len(rows) and is_main_process():
        print(
            f"  {len(rows) - len(kept)} of {len(rows)} prompts are left out: they are empty, or over {tokens} tokens",
            flush=True,
        )
    records = [rows[i] for i in kept]
    given = [record["prompt"] for record in records]
    messages = [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in given
    ]
    return Dataset.from_list(
        [{"prompt": rendered, RECORD: record} for rendered, record in zip(messages, records, strict=True)]
    )
