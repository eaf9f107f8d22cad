"""PPO (or TRL's RLOO or GRPO): a policy and a reward in, a tuned policy out.

In: `prompts` of the prepare artifact, the SFT policy, and a reward artifact of any backbone and tokenizer (or who serves one, or a
`module:function`).
Out: a causal language model with its tokenizer (under LoRA the adapter, or with `merge` the whole model), of PPO also the critic in
`value_head.safetensors`; the same of the best evaluation in `best/`, and with `evaluation.keep` of those before the last in
`policies/step-N/`; `samples.jsonl` (answers of each evaluation) and `log.jsonl`.
A wrong input gets one `UserError`.
"""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from peft import TaskType, get_peft_model
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import open_inputs
from pipeline.artifacts.manifest import Artifact
from pipeline.config import PPOStage, Reward
from pipeline.data.records import open_records
from pipeline.distributed.processes import is_main_process
from pipeline.errors import UserError
from pipeline.models.loading import is_adapter, load_policy, load_tokenizer, merge_adapter
from pipeline.ppo.actor_critic import REFERENCE
from pipeline.ppo.backbone import attach_reward_adapter
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.ppo.callbacks import EarlyStopping
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.policy_trainer import POLICIES, PolicyTrainer
from pipeline.ppo.samples import read_samples
from pipeline.ppo.trainer import PPOTrainer
from pipeline.reward.functions import (
    RewardSource,
    combine_rewards,
    import_function,
    load_reward,
    require_reward,
    reward_from_model,
)
from pipeline.training.arguments import build_arguments, build_lora_config, check_training, load_options
from pipeline.training.callbacks import PrintEvaluations
from pipeline.training.checkpoints import train_with_resume, write_log


def check(config: PPOStage) -> None:
    """Refuse what is wrong with the config alone. Raises `UserError`."""
    check_training(config, arguments_class(config))
    if config.algorithm != "ppo":
        import_module("pipeline.ppo.trl_trainers").check_algorithm(config.algorithm, config.training)
    for spec in (
        config.gold,
        *(reward.source for reward in named_rewards(config).values() if reward.is_function),
    ):
        if spec:
            import_function(spec)


def arguments_class(config: PPOStage) -> type[TrainingArguments]:
    """What `training:` is handed to. TRL's trainers are imported only where they are asked for: they take their time."""
    return (
        PPOConfig
        if config.algorithm == "ppo"
        else import_module("pipeline.ppo.trl_trainers").ARGUMENTS[config.algorithm]
    )


def named_rewards(config: PPOStage) -> dict[str, Reward]:
    """All that scores answers, by the name it has as an input: what is trained on, and the scorer that looks on."""
    named = {f"reward_{number}": reward for number, reward in enumerate(config.reward)}
    return named | ({"scorer": config.evaluation.scorer} if config.evaluation.scorer else {})


def run(config: PPOStage) -> Path:
    check(config)
    inputs = open_inputs(config)
    for name, reward in named_rewards(config).items():
        if not reward.is_function:
            inputs[name] = require_reward(reward, config.make_command("reward"), config.trust_remote_code)
            if config.one_backbone == "always" and (
                apart := incompatibility(config, inputs["policy"], inputs[name])
            ):
                raise UserError(
                    f"{reward.source}: one_backbone: always, but {apart}; change that, or set one_backbone: auto"
                )
    weights = {name: opened.manifest.get("reads", opened.identity) for name, opened in inputs.items()}
    for name in inputs:
        if name.startswith("reward_") and "scorer" in inputs and weights[name] == weights["scorer"]:
            raise UserError(
                f"{inputs['scorer'].path}: evaluation.scorer is a copy of what PPO is trained on; name one that it is not"
            )
    return build_artifact(
        config,
        kind="policy",
        inputs=inputs,
        make=lambda *folders: train(config, inputs, *folders),
        on_every_rank=True,
    )


def train(config: PPOStage, inputs: dict[str, Artifact], output: Path, work: Path) -> dict[str, Any]:
    """Train, save, and measure on the validation prompts; returns the headline metrics."""
    args = build_arguments(config, arguments_class(config), work, logging_steps=1)
    set_seed(config.seed)
    trainer = build_trainer(config, inputs, args)
    train_with_resume(trainer, work)
    metrics = trainer.evaluate()
    trainer.publish(output)
    if not is_main_process():
        return {}
    for name in ("best", *([POLICIES] if config.evaluation.keep else [])):
        shutil.copytree(work / name, output / name)  # a copy: who is killed now needs it again
    shutil.rmtree(
        output / POLICIES / f"step-{trainer.state.global_step:06}", ignore_errors=True
    )  # that is the artifact's own
    for folder in (output, output / "best", *output.glob(f"{POLICIES}/*")) if config.merge else ():
        merge_adapter(folder, trainer.processing_class, trust_remote_code=config.trust_remote_code)
    (output / "samples.jsonl").write_text(read_samples(work), encoding="utf-8")
    write_log(trainer, output)
    return {"metrics": metrics | {"best_step": trainer.state.best_global_step}}


def build_trainer(config: PPOStage, inputs: dict[str, Artifact], args: Any) -> PolicyTrainer:
    """The algorithm's trainer, with all it needs loaded."""
    data, revision = open_records(inputs["records"], "prompts"), inputs["policy"].revision
    tokenizer = load_tokenizer(
        config.policy or "", revision=revision, trust_remote_code=config.trust_remote_code
    )
    policy = load_trained_policy(config, tokenizer, revision)
    opened = {name: open_reward(config, name, inputs, policy) for name in named_rewards(config)}
    scorer = opened.pop("scorer", None)
    weights = [reward.weight for reward in config.reward if reward.weight is not None]
    common: dict[str, Any] = {
        "policy": policy,
        "reward": combine_rewards(list(opened.values()), weights or None, config.uncertainty_penalty),
        "args": args,
        "train_dataset": data["train"],
        "eval_dataset": data["validation"]
        if len(data["validation"])
        else data["train"].select(range(min(64, len(data["train"])))),
        "processing_class": tokenizer,
        "gold": import_function(config.gold) if config.gold else None,
        "scorer": scorer.score if scorer else None,
        "keep": config.evaluation.keep,
        "max_prompt_tokens": config.max_prompt_tokens,
        "callbacks": [PrintEvaluations(), EarlyStopping(config.evaluation.patience if scorer else None)],
    }
    if config.algorithm != "ppo":
        options = {"revision": revision, "trust_remote_code": config.trust_remote_code}
        return import_module("pipeline.ppo.trl_trainers").build_trl_trainer(
            config.algorithm, **options, **common
        )
    return PPOTrainer(
        **common,
        demonstrations=open_records(inputs["records"], "demonstrations")["train"] if args.ptx_coef else None,
    )


def open_reward(config: PPOStage, name: str, inputs: dict[str, Artifact], policy: Any) -> RewardSource:
    """A reward as a source: a reward model stands on the policy's backbone where it can, or beside it, or elsewhere."""
    reward = named_rewards(config)[name]
    if reward.is_function:
        return RewardSource(import_function(reward.source))
    apart = (
        incompatibility(config, inputs["policy"], inputs[name])
        if config.one_backbone != "never"
        else "one_backbone: never"
    )
    where = f"loaded beside the policy: {apart}" if apart else "on the backbone of the policy"
    if is_main_process():
        print(f"  {reward.source}: {f'read as {inputs[name].path}' if reward.is_url else where}", flush=True)
    if apart:
        source = reward_from_model(
            load_reward(reward, inputs[name], trust_remote_code=config.trust_remote_code),
            reward.length_penalty,
        )
        return source._replace(model=None) if reward.is_url else source
    options: dict[str, Any] = {
        "positive_label": reward.positive_label,
        "trust_remote_code": config.trust_remote_code,
    }
    return attach_reward_adapter(policy, inputs[name], name, reward.length_penalty, **options)


def load_trained_policy(
    config: PPOStage, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> Any:
    """The SFT policy, ready to train: all of it, a new LoRA adapter on it, or (where SFT published an adapter) a copy of that
    adapter beside the frozen one."""
    source = config.policy or ""
    options = load_options(config, revision)
    if not is_adapter(source, revision):
        policy: Any = load_policy(source, tokenizer, **options)
        lora = build_lora_config(config, TaskType.CAUSAL_LM, revision)
        return policy if lora is None else get_peft_model(policy, lora)
    if config.lora is None:
        raise UserError(
            f"{source}: is a LoRA adapter, but ppo has no 'lora:' section; the policy goes on from that adapter: set lora: {{}}"
        )
    policy = load_policy(source, tokenizer, trainable=True, **options)
    policy.load_adapter(source, adapter_name=REFERENCE, revision=revision)
    policy.set_adapter("default")
    return policy
