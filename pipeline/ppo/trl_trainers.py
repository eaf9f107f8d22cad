"""`algorithm: rloo | grpo`: TRL's own trainers, with the reward, evaluations and artifact of PPO.

TRL decodes responses without special tokens, so that a truncated response looks like one that ended. Here the
reward function gets the exact completion ids. Scores are what PPO's are by default: normalized by the
reference sample, less `MISSING_EOS_PENALTY` for a missing EOS. Evaluations sample with `temperature`, `top_k`
and `top_p`; TRL's other sampling options apply to training only.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, Features, List, Value
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.errors import UserError, explain_row, one_line
from pipeline.models.adapters import is_adapter
from pipeline.models.chat import as_messages, prompt_ids
from pipeline.models.ends import declare_ends, end_token_ids
from pipeline.models.generation import unknown_ids
from pipeline.models.probes import Sampling, describe_sampling, model_name
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.callbacks import DropStaleCheckpoints
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.policy_trainer import GenerationShape, PolicyTrainer, prompt_budget
from pipeline.reward.calls import RewardFunction, call_reward_functions
from pipeline.reward.functions import RewardSource
from pipeline.reward.token_rewards import total_reward

MISSING_EOS_PENALTY = PPOConfig.missing_eos_penalty
RECORD = (
    "record"  # the only column beside the prompt, so that no column of the user's has a name that TRL reads
)
MESSAGES = List({"role": Value("string"), "content": Value("string")})
SET_BY_STAGE = {  # argument of TRL's configs -> what to set instead
    "model_init_kwargs": "policy",
    "trust_remote_code": "trust_remote_code",
    "reward_weights": "the weights of 'reward'",
    "remove_unused_columns": "nothing: the reward gets all columns",
    "disable_dropout": "nothing: there is no dropout",
    "chat_template_kwargs": "nothing: one template everywhere",
    "load_best_model_at_end": "nothing: best/ holds the best",
    "metric_for_best_model": "nothing: best/ holds the best",
}


BATCHING = "it had not sampled one batch after a minute where it should take a second"
UNSUPPORTED = {  # argument of TRL's configs -> why it is refused
    "label_smoothing_factor": "the loss is that of 'algorithm'",
    "use_transformers_paged": BATCHING,
    "use_transformers_continuous_batching": BATCHING,
    "transformers_continuous_batching_config": BATCHING,
}


class _RLOOConfig(RLOOConfig):
    RESERVED: ClassVar[dict[str, str]] = SET_BY_STAGE


class _GRPOConfig(GRPOConfig):
    RESERVED: ClassVar[dict[str, str]] = SET_BY_STAGE


class _TRLTrainer(PolicyTrainer):
    """What the trainers below share: TRL's trainer, evaluated as PPO is."""

    def prompts_in_training(self) -> Dataset:
        """Return the rows of the prompts that TRL samples from, as they were."""
        rows: Any = self.train_dataset
        return Dataset.from_list(rows[RECORD][:], Features(rows.features[RECORD]))


class _RLOO(_TRLTrainer, RLOOTrainer):
    """TRL's RLOO."""


class _GRPO(_TRLTrainer, GRPOTrainer):
    """TRL's GRPO."""


ARGUMENTS: dict[str, type[TrainingArguments]] = {"ppo": PPOConfig, "rloo": _RLOOConfig, "grpo": _GRPOConfig}
TRAINERS: dict[str, Any] = {"rloo": _RLOO, "grpo": _GRPO}


def check_algorithm(algorithm: str, training: dict[str, Any]) -> None:
    """Raise `UserError` for values in `training:` with which TRL would fail only during training."""
    unsupported = {"save_strategy": "best", "lr_scheduler_type": "reduce_lr_on_plateau"}
    for key, value in unsupported.items():
        if training.get(key) == value:
            raise UserError(
                f"ppo: training.{key}: {value} is not for algorithm: {algorithm}; best/ is kept anyway; "
                "choose another"
            )
    mappings = {key: value for key, value in training.items() if isinstance(value, dict)}
    for key in mappings.get("generation_kwargs", {}).keys() - GenerationConfig().to_dict().keys():
        raise UserError(f"ppo: training.generation_kwargs.{key}: GenerationConfig has no such key")
    for key, mapping in mappings.items():
        if "every_n_layers" in mapping:
            raise UserError(
                f"ppo: training.{key}.every_n_layers is not for algorithm: {algorithm}; remove it"
            )


def build_trl_trainer(
    algorithm: str,
    policy: Any,
    reward: RewardSource,
    args: Any,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    callbacks: Sequence[TrainerCallback],
    revision: str | None = None,
    trust_remote_code: bool = False,
    **evaluation: Any,
) -> PolicyTrainer:
    """Build the trainer of an algorithm.

    `args` are of the class in `ARGUMENTS`. `evaluation` are `gold`, `scorer` and `keep` of a `PolicyTrainer`.
    Prompts over `max_prompt_tokens` are left out, and their number is printed. `revision` is the policy's
    commit, from which TRL loads the reference. Raises `UserError` if TRL refuses the arguments, or with too
    few prompts.
    """
    budget = prompt_budget(policy, args.max_completion_length, max_prompt_tokens)
    require_plain_batches(algorithm, policy, budget + args.max_completion_length)
    _suppress_unknown_ids(args, unknown_ids(policy, processing_class))
    prompts = filter_prompts(train_dataset, processing_class, budget)
    _require_full_batch(algorithm, prompts, args)
    ends = end_token_ids(policy, processing_class)
    declare_ends(policy, ends)  # TRL ends responses with these
    args.model_init_kwargs = {"revision": revision} if revision else None
    args.trust_remote_code = trust_remote_code

    actor = ActorCritic(policy, kl_coef=0.0)  # for the KL of evaluations: TRL has no reference if beta is 0
    if actor.reference is not None and args.beta:
        folder = Path(str(args.output_dir)) / "reference"
        ensure_reference_checkpoint(policy, folder, revision, trust_remote_code)

    trainer = _construct(
        algorithm,
        model=policy,
        reward_funcs=as_reward_func(reward, processing_class, ends),
        args=args,
        train_dataset=prompts,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        callbacks=[*callbacks, DropStaleCheckpoints()],
    )
    _share_reference(actor, trainer)
    trainer.actor, trainer.reward, trainer.max_prompt_tokens = actor, reward, budget
    trainer.generation = _generation_shape(args)
    for name, value in evaluation.items():
        setattr(trainer, name, value)
    return trainer


def require_plain_batches(algorithm: str, policy: Any, tokens: int = 0) -> None:
    """Raise `UserError` if the policy needs batches of its own, which TRL does not form.

    `tokens` is the length of the longest prompt with its response.
    """
    if describe_sampling(policy, tokens) != Sampling():
        raise UserError(
            f"{model_name(policy)}: algorithm: {algorithm} pads prompts and uses a cache, which changes what "
            "this policy samples; use algorithm: ppo"
        )


def _suppress_unknown_ids(args: Any, ids: list[int]) -> None:
    """Let TRL never sample ids that the tokenizer does not have. vLLM has no such option."""
    if ids and not args.use_vllm:
        options = args.generation_kwargs or {}
        args.generation_kwargs = options | {"suppress_tokens": [*options.get("suppress_tokens", []), *ids]}


def ensure_reference_checkpoint(
    policy: Any, folder: Path, revision: str | None, trust_remote_code: bool
) -> None:
    """Let TRL load the reference from `folder` if the policy's own checkpoint is not that reference.

    TRL loads the reference from the policy's checkpoint. If the tokenizer has more tokens than that, the
    policy was resized after loading, and is saved to `folder`; so is an adapter merged into its base.
    """
    is_merged = is_adapter(policy.name_or_path, revision)
    if not is_merged:
        config = AutoConfig.from_pretrained(
            policy.name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    if is_merged or config.get_text_config().vocab_size != policy.config.get_text_config().vocab_size:
        if is_main_process():
            policy.save_pretrained(folder)
        broadcast("written")
        policy.config._name_or_path = str(folder)


def as_reward_func(
    reward: RewardSource, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> RewardFunction:
    """Return the reward as TRL calls it: with messages as prompts, and texts without their end token.

    `ends` are the ids that end a response. Rewards inside a response are summed, which is printed once. TRL
    does not train on a response whose reward is None.
    """
    printed: list[str] = []

    def reward_function(
        prompts: Any,
        completions: Any,
        completion_ids: Any,
        trainer_state: Any,
        log_extra: Any,
        log_metric: Any,
        **columns: Any,
    ) -> list[float | None]:
        ended = [ids[-1] in ends for ids in completion_ids]
        texts = [
            str(tokenizer.decode(ids[: len(ids) - end], skip_special_tokens=True))
            for ids, end in zip(completion_ids, ended, strict=True)
        ]
        records = columns[RECORD]
        original = {name: [record[name] for record in records] for name in records[0]}
        original_prompts = original.pop("prompt")
        original |= {"trainer_state": trainer_state, "log_extra": log_extra, "log_metric": log_metric}
        batch = (original_prompts, texts, completion_ids, ended, original)
        [rewards] = call_reward_functions([reward.for_training], *batch, tokenizer=tokenizer)
        if not printed and any(isinstance(entry, list) for entry in rewards):
            printed.append("  rewards of tokens and steps are summed: RLOO and GRPO have one per response")
            if is_main_process():
                print(printed[0], flush=True)
        raw = [None if entry is None else total_reward(entry) for entry in rewards]
        if valid := [score for score in raw if score is not None]:
            log_metric("raw_reward", statistics.fmean(valid))
        return [
            None
            if score is None
            else (score - reward.mean) / (reward.std or 1.0) - MISSING_EOS_PENALTY * (not end)
            for score, end in zip(raw, ended, strict=True)
        ]

    return reward_function


def filter_prompts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Dataset:
    """Keep the rows whose prompt has 1 to `max_tokens` tokens, and print how many are left out.

    So are rows that spell a special token in a text: TRL would encode it as one.

    The column `prompt` has messages, which TRL renders as this project does; the column `RECORD` has the rows
    as they were. Raises `UserError` if no row is left.
    """
    kept = []
    for index, prompt in enumerate(rows["prompt"]):
        with explain_row(f"ppo: prompts: row {index}"):
            ids = prompt_ids(tokenizer, prompt)
        read = tokenizer.apply_chat_template(
            as_messages(prompt), add_generation_prompt=True, return_dict=False
        )
        if 0 < len(ids) <= max_tokens and ids == read:
            kept.append(index)
    records = [rows[index] for index in kept]
    if not records:
        raise UserError(
            f"ppo: none of the {len(rows)} prompts has 1 to {max_tokens} tokens; raise max_prompt_tokens, or "
            "lower training.max_completion_length"
        )
    if len(records) < len(rows) and is_main_process():
        print(
            f"  {len(rows) - len(records)} of {len(rows)} prompts are left out: they are empty, "
            f"over {max_tokens} tokens, or spell a special token",
            flush=True,
        )
    table = {"prompt": [as_messages(record["prompt"]) for record in records], RECORD: records}
    text = rows.features["prompt"]
    messages = MESSAGES if isinstance(text, Value) else text
    return Dataset.from_dict(table, Features({"prompt": messages, RECORD: rows.features}))


def _require_full_batch(algorithm: str, prompts: Dataset, args: Any) -> None:
    needed = args.generation_batch_size // args.num_generations
    if len(prompts) < needed:
        raise UserError(
            f"ppo: {len(prompts)} prompts to train on, and algorithm: {algorithm} samples responses to "
            f"{needed} at a time and drops an incomplete batch; lower training.generation_batch_size, "
            "or raise training.num_generations"
        )


def _construct(algorithm: str, **kwargs: Any) -> Any:
    try:
        return TRAINERS[algorithm](**kwargs)
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"ppo: algorithm: {algorithm}: {one_line(error)}") from error


def _share_reference(actor: ActorCritic, trainer: Any) -> None:
    """Replace the actor's copy of the reference by TRL's own, which is the same model, if there is one."""
    device = trainer.args.device
    if actor.reference is not None:
        has_own = trainer.ref_model is not None
        actor.reference = trainer.ref_model if has_own else actor.reference.to(device)
    actor.value_head.to(device)


def _generation_shape(args: Any) -> GenerationShape:
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "batch_size": args.per_device_eval_batch_size,
    }
    return GenerationShape(args.max_completion_length, args.num_generations_eval or 1, options)
