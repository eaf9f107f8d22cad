"""Trains every stage in small, by as many processes as it is started with: `test_processes.py` starts it, and
compares.

`python together.py FOLDER RECORDS MODEL sft ppo pairwise …`. The records of stepwise are in FOLDER.
With KILL=step in the environment rank 1 gets SIGKILL at that optimizer step, or the signal of the number in
SIGNAL. BEGUN_BY is the number of processes that the config is for, if it is another than there are.
"""

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from pipeline import Critic, PPOConfig, PPOTrainer, cli
from pipeline.artifacts import files
from pipeline.config import Reward
from pipeline.distributed.processes import (
    destroy_process_group,
    init_process_group,
    is_main_process,
    world_size,
)
from pipeline.distributed.sharding import disable_zero3_init
from pipeline.models.chat import pad_rows
from pipeline.models.generation import Responses
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.ppo.reward_shapes import add_shape_callbacks
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import RewardSource
from pipeline.reward.shaping import shape_source
from pipeline.training.checkpoints import write_log

RECIPES = Path(__file__).resolve().parent.parent.parent / "configs"
OBJECTIVES = {
    "pairwise": [],
    "ranking": [],
    "plackett_luce": [],
    "classification": ["positive_label=nothate"],
    "regression": [],
    "stepwise": ["encoding.step_separator=' '"],
}
PPO = {
    "ppo": {},
    "ppo-bf16": {"bf16": True},
    "ppo-shaped": {"shapes": ({"normalize": "running"}, {"transform": "sigmoid", "references": 3})},
    "ppo-engine": {"generate": "served", "importance_cap": 1.5},
    "ppo-adapter": {"critic": "adapter", "critic_warmup_rollouts": 1, "gradient_checkpointing": True},
    "ppo-critic": {
        "critic": "model",
        "gradient_checkpointing": True,
        "lam_value": 1.0,
        "lam_length": 0.5,
        "clip_value": None,
        "critic_warmup_rollouts": 2,
        "critic_warmup_patience": 1,
    },
}
SCORING = {"score": "answers.jsonl", "best-of-n": "prompts.jsonl", "generate": "prompts.jsonl"}
ROWS = 8  # of a step, whoever trains on them


def main(folder: Path, records: str, model: str, *stages: str) -> None:
    files.CACHE = folder / "hashes"
    gc.freeze()  # each training ends with a collection, which need not look at what the imports made
    for stage in stages:
        source = folder / "steps" if stage == "stepwise" else records
        given = [f"runs={folder}", f"run={stage}", f"records={source}", f"model={model}", "max_length=96"]
        trained = {
            "max_steps": 4,
            "save_steps": 1,
            "logging_steps": 1,
            "per_device_train_batch_size": ROWS // 2,
        }
        begun_by = int(os.environ.get("BEGUN_BY", world_size()))
        trained |= {
            "gradient_accumulation_steps": 2 // begun_by,
            "eval_strategy": "no",
            "logging_strategy": "steps",
        }
        given += [f"training.{key}={value}" for key, value in trained.items()]
        if stage in PPO:
            ppo(folder / stage, model, **PPO[stage])
        elif stage in SCORING:
            scored = ["--input", str(folder / SCORING[stage]), "--output", str(folder / f"{stage}.jsonl")]
            reward = ["--reward", str(folder / "pairwise/reward")]
            policy = ["--policy", str(folder / "sft/sft"), "--n", "3", "--response-tokens", "6"]
            models = {"score": reward, "best-of-n": reward + policy, "generate": policy}[stage]
            cli.main([stage, *models, *scored])
        elif stage == "sft":
            cli.main(["sft", "--config", str(RECIPES / "smollm2/sft.yaml"), *given, "lora=null"])
        else:
            config = [
                "--config",
                str(RECIPES / "gpt2-ranked/reward.yaml"),
                f"objective={stage}",
                *OBJECTIVES[stage],
            ]
            cli.main(["reward", *config, *given])


def recorded(policy, tokenizer, prompts, noise, temperature=1.0, **_) -> Responses:
    """Answers that were drawn once and for all: each row's noise, of which none depends on the rank, spells
    its own.
    """
    ids = [
        [5 + int(500 * number) for number in row[: 3 + int(5 * row[0])]] + [tokenizer.eos_token_id]
        for row in noise.tolist()
    ]
    query, response = (
        pad_rows(prompts, tokenizer.pad_token_id, side="left"),
        pad_rows(ids, tokenizer.pad_token_id),
    )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Responses(*query, *response, texts, [True] * len(ids))


def served(policy, tokenizer, prompts, noise, **options) -> Responses:
    """The recorded answers, with log-probabilities around those of a policy that knows nothing."""
    found = recorded(policy, tokenizer, prompts, noise, **options)
    found.sampler_logprobs = -6 - (found.response_ids % 7) / 4 * found.response_mask
    return found


def start_of(model: str, tokenizer, critic: str) -> tuple[Any, Critic]:
    """The policy, under LoRA if the critic is an adapter of it, and the critic."""
    policy, learning_rate = load_policy(model, tokenizer), None if critic == "trunk" else 2e-3
    if critic == "adapter":
        policy = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trunk = load_policy(model, tokenizer) if critic == "model" else None
    return policy, Critic(critic, model=trunk, learning_rate=learning_rate)


def ppo(
    folder: Path,
    model: str,
    critic: str = "trunk",
    generate: str = "recorded",
    shapes: tuple[dict[str, Any], ...] = (),
    **more: object,
) -> None:
    init_process_group()
    tokenizer = load_tokenizer(model)
    prompts = Dataset.from_list([{"prompt": f"Name {number} fruits."} for number in range(1, 20)])
    args = PPOConfig(
        str(folder),
        num_rollouts=3,
        num_ppo_epochs=2,
        num_mini_batches=2,
        per_device_train_batch_size=ROWS // 2,
        gradient_accumulation_steps=2 // world_size(),
        response_tokens=10,
        learning_rate=1e-3,
        score_normalization="running",
        kl_target=1.0,
        entropy_coef=0.01,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    disable_zero3_init(args)
    torch.manual_seed(0)

    def evenness(completion_ids, **_):
        """The share of even tokens, where they are; of responses with an odd first token, as one number."""
        shares = [[(token % 2 == 0) / len(ids) for token in ids] for ids in completion_ids]
        return [
            sum(share) if ids[0] % 2 else share for share, ids in zip(shares, completion_ids, strict=True)
        ]

    policy, start = start_of(model, tokenizer, critic)
    parts = [shape_source(RewardSource(evenness), Reward(source="a", **shape), "a", "") for shape in shapes]
    trainer = PPOTrainer(
        policy,
        combine_rewards(parts, tokenizer=tokenizer) if parts else evenness,
        args,
        prompts,
        tokenizer,
        eval_dataset=prompts.select(range(5)),
        generate=globals()[generate],
        critic=start,
    )
    add_shape_callbacks(trainer)
    trainer.train()
    trainer.evaluate()
    trainer.publish(folder)
    if is_main_process():
        write_log(trainer, folder)


def die_at(step: int) -> None:
    """Rank 1, at an optimizer step: all have then written what came before it."""
    steps = torch.optim.AdamW.step
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == step and not is_main_process():
            os.kill(os.getpid(), int(os.environ.get("SIGNAL", signal.SIGKILL)))
        return steps(*args, **kwargs)

    torch.optim.AdamW.step = counted


if __name__ == "__main__":
    if "KILL" in os.environ:
        die_at(int(os.environ["KILL"]))
    main(Path(sys.argv[1]), *sys.argv[2:])
    destroy_process_group()
