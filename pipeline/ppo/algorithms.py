"""`algorithm: rloo | grpo`: TRL's own trainers with this project's reward, and the evaluation and artifact that PPO has.

TRL decodes answers without special tokens, so that one that was cut off looks like one that ended. Here the reward reads the exact
completion ids, and is what PPO's is by default: normalised by the reference sample, less `MISSING_EOS_PENALTY` for a missing EOS.
"""

import statistics
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pipeline import encoding
from pipeline.errors import UserError
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.evaluation import Drawing, Watched, room
from pipeline.ranks import is_main_process
from pipeline.reward.sources import RewardFunction, RewardSource, ask

MISSING_EOS_PENALTY = PPOConfig.missing_eos_penalty
PROMPT = "prompt_as_given"  # the column beside the messages that TRL renders
SET_BY_STAGE = {
    "model_init_kwargs": "policy", "trust_remote_code": "trust_remote_code", "reward_weights": "the weights of 'reward'",
    "remove_unused_columns": "nothing: the reward is given all columns", "disable_dropout": "nothing: there is no dropout",
    "load_best_model_at_end": "nothing: best/ holds the best", "metric_for_best_model": "nothing: best/ holds the best",
}  # fmt: skip


class _RLOOConfig(RLOOConfig):
    RESERVED: ClassVar[dict[str, str]] = SET_BY_STAGE


class _GRPOConfig(GRPOConfig):
    RESERVED: ClassVar[dict[str, str]] = SET_BY_STAGE


class _RLOO(Watched, RLOOTrainer):
    """TRL's trainer, evaluated as PPO is."""


class _GRPO(Watched, GRPOTrainer):
    """TRL's trainer, evaluated as PPO is."""


ARGUMENTS: dict[str, type[TrainingArguments]] = {"ppo": PPOConfig, "rloo": _RLOOConfig, "grpo": _GRPOConfig}
TRAINERS: dict[str, Any] = {"rloo": _RLOO, "grpo": _GRPO}


def trl_trainer(
    algorithm: str, policy: Any, reward: RewardSource, args: Any, train_dataset: Dataset, processing_class: PreTrainedTokenizerBase,
    max_prompt_tokens: int, revision: str | None = None, **watched: Any,
) -> Watched:  # fmt: skip
    """The trainer of an algorithm. `watched` are `eval_dataset`, `callbacks`, and the attributes of a `Watched`.

    Prompts over `max_prompt_tokens` are left out, and counted. `revision` is the policy's commit, from which TRL reads the reference.
    """
    tokens = room(policy, args.max_completion_length, max_prompt_tokens)
    rows = readable(train_dataset, processing_class, tokens)
    # One EOS for all algorithms: TRL's would also end answers with others that the checkpoint declares.
    policy.generation_config.eos_token_id = processing_class.eos_token_id
    args.model_init_kwargs = {"revision": revision} if revision else None
    given = {name: watched.pop(name) for name in ("eval_dataset", "callbacks")}
    actor = ActorCritic(policy, kl_coef=0.0)  # for the KL of evaluations: TRL drops the reference where beta is 0
    trainer: Watched = TRAINERS[algorithm](
        model=policy, reward_funcs=scorer_of(reward, processing_class), args=args, train_dataset=rows,
        processing_class=processing_class, **given,
    )  # fmt: skip
    if actor.reference is not None:
        actor.reference.to(args.device)
    actor.value_head.to(args.device)
    trainer.actor, trainer.reward, trainer.max_prompt_tokens = actor, reward, tokens
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "batch_size": args.per_device_eval_batch_size}
    trainer.drawing = Drawing(args.max_completion_length, args.num_generations_eval or 1, options)
    for name, value in watched.items():
        setattr(trainer, name, value)
    return trainer


def scorer_of(reward: RewardSource, tokenizer: PreTrainedTokenizerBase) -> RewardFunction:
    """The reward as TRL calls it, with messages for prompts and texts that do not tell whether an answer ended."""

    def reward_function(prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, log_extra: Any, log_metric: Any,
                        **columns: Any) -> list[float]:  # fmt: skip
        ended = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        texts = [
            str(tokenizer.decode(ids[: len(ids) - end], skip_special_tokens=True)) for ids, end in zip(completion_ids, ended, strict=True)
        ]
        raw = ask(reward.score, columns.pop(PROMPT), texts, completion_ids, ended, columns)
        log_metric("raw_reward", statistics.fmean(raw))
        scores = [(score - reward.mean) / (reward.std or 1.0) for score in raw]
        return [score - MISSING_EOS_PENALTY * (not end) for score, end in zip(scores, ended, strict=True)]

    return reward_function


def readable(rows: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """Rows with prompts of at most so many tokens: as messages, which TRL renders as everything here does, and as they were."""
    kept = [i for i, prompt in enumerate(rows["prompt"]) if 0 < len(encoding.prompt_ids(tokenizer, prompt)) <= tokens]
    if not kept:
        raise UserError(f"ppo: none of the {len(rows)} prompts has 1 to {tokens} tokens; raise max_prompt_tokens, or shorten the answers")
    if len(kept) < len(rows) and is_main_process():
        print(f"  {len(rows) - len(kept)} of {len(rows)} prompts are left out: they are empty, or over {tokens} tokens", flush=True)
    as_given = [rows[i]["prompt"] for i in kept]
    messages = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in as_given]
    return Dataset.from_list(
        [{**rows[i], "prompt": rendered, PROMPT: given} for i, rendered, given in zip(kept, messages, as_given, strict=True)]
    )
