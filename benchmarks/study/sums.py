"""What do rewards inside a response buy? The study's part on the world of sums.

In: nothing. The recipe `sums` makes the records, the SFT policy and the stepwise reward model of each seed.
Out: the commands of `rlhf` that make `runs/study/sums-N…/`; `sums_report` reads these runs.
Each arm starts from the SFT policy of its seed, and samples 40 rollouts of 64 responses.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SEEDS = range(4)
FINAL = "pipeline.prepare.sums:right_answer"
STEPS = "pipeline.prepare.sums:step_rewards"
CONFIGS = {
    "ppo": "configs/sums/ppo.yaml",
    "rloo": "benchmarks/study/rloo.yaml",
    "grpo": "benchmarks/study/rloo.yaml",
}

# A response to each validation prompt after every fourth rollout.
EVALUATIONS = ["evaluation.keep=false", "training.eval_steps=16"]
# With a reward at the end, credit must reach back over the whole response.
AT_THE_END = ["training.gamma=1", "training.kl_coef=0.02", "training.target_kl=null"]
UNCLIPPED = [*AT_THE_END, "training.clip_value=null"]
PRETRAINED = [*UNCLIPPED, "training.lam=0.95", "training.critic_warmup_rollouts=4"]
OWN_MODEL = ["critic.on=model", "critic.learning_rate=1e-3"]
ADAPTERS = [
    *("lora.r=16", "lora.lora_alpha=32", "lora.target_modules=all-linear"),
    *("training.learning_rate=1e-3", "critic.on=adapter", "critic.learning_rate=2e-3"),
]

Command = list[str]


class Arm(NamedTuple):
    """A way to train: its title in the report, its algorithm, reward and settings.

    A reward of None is the stepwise reward model of the seed.
    """

    title: str
    algorithm: str
    reward: str | None
    options: Sequence[str] = ()


ARMS = {
    "final": Arm(
        "PPO, final answer, critic as in `demo`",
        "ppo",
        FINAL,
        [*AT_THE_END, "training.lam=1", "training.vf_coef=0.03"],
    ),
    "final-pretrained": Arm(
        "PPO, final answer, critic on the trunk, pretrained",
        "ppo",
        FINAL,
        [*PRETRAINED, "training.vf_coef=0.5"],
    ),
    "final-adapter": Arm(
        "PPO, final answer, critic an adapter, pretrained",
        "ppo",
        FINAL,
        [*PRETRAINED, *ADAPTERS],
    ),
    "final-model": Arm(
        "PPO, final answer, critic a model, pretrained", "ppo", FINAL, [*PRETRAINED, *OWN_MODEL]
    ),
    "final-judge": Arm(
        "PPO, final answer, critic from the stepwise model",
        "ppo",
        FINAL,
        [
            *UNCLIPPED,
            *OWN_MODEL,
            "critic.source={source}/reward",
            "critic.learning_rate=2e-3",
            "training.critic_warmup_rollouts=3",
            "training.lam=0.95",
            "training.lam_value=1",
            "training.learning_rate=4e-4",
            "training.kl_coef=0.05",
        ],
    ),
    "gold-steps": Arm("PPO, gold step rewards", "ppo", STEPS),
    "learned-steps": Arm("PPO, learned stepwise model", "ppo", None),
    "rloo-learned-steps": Arm("RLOO, learned stepwise model, summed", "rloo", None),
    "rloo": Arm("RLOO, final answer", "rloo", FINAL),
    "grpo": Arm("GRPO, final answer", "grpo", FINAL, ["algorithm=grpo"]),
}


def commands(runs: Path, seed: int) -> Iterator[Command]:
    """Yield the commands of one seed: the recipe up to the reward model, then every arm."""
    source, common = runs / f"sums-{seed}", ["--seed", str(seed), f"runs={runs}"]
    yield ["run", "--recipe", "sums", "--run", source.name, "--until", "reward", *common]
    for name, arm in ARMS.items():
        run = ["--config", CONFIGS[arm.algorithm], "--run", f"{source.name}-{name}", *common]
        inputs = [f"records={source}/prepare", f"policy={source}/sft"]
        options = [option.format(source=source) for option in arm.options]
        yield ["ppo", *run, *inputs, f"reward={arm.reward or source / 'reward'}", *EVALUATIONS, *options]
