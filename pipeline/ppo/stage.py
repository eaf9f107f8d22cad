"""The PPO stage (also TRL's RLOO and GRPO): a policy and a reward in, a tuned policy out.

In: `prompts` of the prepare artifact, the SFT policy, and the rewards. A reward is an artifact of any
backbone and tokenizer, the URL of a server, or a `module:function`.

Out: a causal language model with its tokenizer (under LoRA the adapter, or with `merge` the whole model). PPO
adds the critic in `critic/`. `best/` has the same of the best evaluation; with
`evaluation.keep`, `policies/step-N/` has those of all evaluations before the last. `samples.jsonl` has
responses of each evaluation, `log.jsonl` the metrics, and `rewards.json` the parts of a sum of rewards.

Raises one `UserError` for a wrong input.
"""

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, TaskType
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import open_inputs
from pipeline.artifacts.manifest import Artifact
from pipeline.artifacts.seals import SEAL
from pipeline.config import PPOStage, Reward
from pipeline.config.reward import name_rewards
from pipeline.data.records import open_records
from pipeline.distributed.processes import is_main_process
from pipeline.errors import UserError
from pipeline.models.adapters import add_adapter, modified_base
from pipeline.models.loading import load_tokenizer, merge_adapter
from pipeline.ppo.backbone import attach_reward_adapter
from pipeline.ppo.backbone_compat import incompatibility
from pipeline.ppo.callbacks import EarlyStopping
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.critic_source import check_critic_section, load_critic, open_critic
from pipeline.ppo.engines import open_sampler
from pipeline.ppo.inputs import add_reference
from pipeline.ppo.policy_trainer import POLICIES, PolicyTrainer
from pipeline.ppo.reward_shapes import add_shape_callbacks
from pipeline.ppo.samples import read_samples
from pipeline.ppo.trainer import PPOTrainer
from pipeline.reward.calls import reward_name
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import (
    RewardSource,
    load_reward,
    require_reward,
    reward_from_model,
)
from pipeline.reward.importing import open_function
from pipeline.reward.named import explain_reward, label_reward, name_reward
from pipeline.reward.parts import write_rewards
from pipeline.reward.shaping import shape_source
from pipeline.training.arguments import build_arguments, build_lora_config, check_training
from pipeline.training.callbacks import PrintProgress, StopAtNonFinite
from pipeline.training.checkpoints import train_with_resume, write_log
from pipeline.training.policies import continued_adapter, load_start

FALLBACK_EVAL_PROMPTS = 64  # training prompts to evaluate on if the records have no validation split


def check(config: PPOStage) -> None:
    """Check the config alone, without its inputs. Raises `UserError`."""
    unsupported: dict[str, str] = {}
    if config.algorithm != "ppo":
        _trl_trainers().check_algorithm(config.algorithm, config.training)
        unsupported = _trl_trainers().UNSUPPORTED
    check_training(config, arguments_class(config), unsupported)
    _check_lora_start(config)
    check_critic_section(config)

    if config.gold:
        open_function("gold", config.gold)
    for name, reward in named_rewards(config).items():
        if reward.is_function:
            open_function(reward_key(config, name), reward)


def arguments_class(config: PPOStage) -> type[TrainingArguments]:
    """Return the class that `training:` is passed to."""
    return PPOConfig if config.algorithm == "ppo" else _trl_trainers().ARGUMENTS[config.algorithm]


def named_rewards(config: PPOStage) -> dict[str, Reward]:
    """Return the rewards by their names as inputs: those to train on, and the held-out `scorer`."""
    rewards = {f"reward_{number}": reward for number, reward in enumerate(config.reward)}
    if config.evaluation.scorer:
        rewards["scorer"] = config.evaluation.scorer
    return rewards


def reward_key(config: PPOStage, name: str) -> str:
    """Return the key of the config behind a reward's name as an input, such as `reward[1]`."""
    if name == "scorer":
        return "evaluation.scorer"
    return f"reward[{name.removeprefix('reward_')}]" if len(config.reward) > 1 else "reward"


def run(config: PPOStage) -> Path:
    """Run the stage and return the folder of its artifact. Raises `UserError`."""
    check(config)
    inputs = open_all_inputs(config)
    return build_artifact(
        config,
        kind="policy",
        inputs=inputs,
        make=lambda output, work: train(config, inputs, output, work),
        on_every_rank=True,
    )


def open_all_inputs(config: PPOStage) -> dict[str, Artifact]:
    """Open the records, the policy, the rewards and the critic's source. Raises `UserError`."""
    inputs = open_inputs(config)
    starting_adapter(config, inputs["policy"].revision)
    for name, reward in named_rewards(config).items():
        if reward.is_function:
            continue
        with explain_reward(label_reward(reward_key(config, name), reward.source)):
            inputs[name] = require_reward(reward, config.make_command("reward"), config.trust_remote_code)
            _check_backbone(config, name, inputs)
    _check_scorer_is_held_out(inputs)
    if config.critic.source:
        inputs["critic"] = open_critic(config, inputs["policy"])
    return inputs


def train(config: PPOStage, inputs: dict[str, Artifact], output: Path, work: Path) -> dict[str, Any]:
    """Train, evaluate on the validation prompts, and save; return the headline metrics.

    `output` becomes the artifact. `work` has the checkpoints and survives an interruption.
    """
    args = build_arguments(config, arguments_class(config), work, logging_steps=1)
    set_seed(config.seed)
    trainer = build_trainer(config, inputs, args)
    add_shape_callbacks(trainer)
    train_with_resume(trainer, work)
    metrics = trainer.evaluate()
    trainer.publish(output)
    if not is_main_process():
        return {}

    _copy_policies(config, trainer, output, work)
    (output / "samples.jsonl").write_text(read_samples(work), encoding="utf-8")
    write_log(trainer, output)
    write_rewards(output, config.reward, trainer.reward.parts)
    return {"metrics": metrics | {"best_step": trainer.state.best_global_step}}


def build_trainer(config: PPOStage, inputs: dict[str, Artifact], args: TrainingArguments) -> PolicyTrainer:
    """Build the trainer of the algorithm, with its data, policy and rewards loaded."""
    prompts, revision = open_records(inputs["records"], "prompts"), inputs["policy"].revision
    tokenizer = load_tokenizer(
        config.policy or "", revision=revision, trust_remote_code=config.trust_remote_code
    )
    policy = load_trained_policy(config, tokenizer, revision)
    rewards = {name: open_reward(config, name, inputs, policy) for name in named_rewards(config)}
    for reward in rewards.values():
        if reward.model is not None:
            for split in ("train", "validation"):
                with explain_reward(reward_name(reward.score)):
                    reward.model.check_prompts(prompts[split]["prompt"], f"{config.records}: {split} prompts")
    scorer = rewards.pop("scorer", None)
    sources = [
        shape_source(source, section, label_reward(reward_key(config, name), section.source), logged)
        for (name, source), section, logged in zip(
            rewards.items(), config.reward, name_rewards(config.reward), strict=True
        )
    ]
    weights = [reward.weight for reward in config.reward if reward.weight is not None]
    patience = config.evaluation.patience if scorer else None

    common: dict[str, Any] = {
        "policy": policy,
        "reward": combine_rewards(sources, weights or None, config.uncertainty_penalty, tokenizer),
        "args": args,
        "train_dataset": prompts["train"],
        "eval_dataset": _evaluation_prompts(prompts),
        "processing_class": tokenizer,
        "gold": open_function("gold", config.gold) if config.gold else None,
        "scorer": scorer.score if scorer else None,
        "keep": config.evaluation.keep,
        "max_prompt_tokens": config.max_prompt_tokens,
        "overlong": config.overlong,
        "callbacks": [PrintProgress(), EarlyStopping(patience)],
    }
    if not isinstance(args, PPOConfig):  # which skips such a step
        common["callbacks"].append(StopAtNonFinite(config.stage))
        options = {"revision": revision, "trust_remote_code": config.trust_remote_code}
        return _trl_trainers().build_trl_trainer(config.algorithm, **options, **common)
    demonstrations = open_records(inputs["records"], "demonstrations")["train"] if args.ptx_coef else None
    critic = load_critic(config, inputs, policy, tokenizer)
    if config.rollouts is not None:
        common["generate"] = open_sampler(config, Path(str(args.output_dir)))
    return PPOTrainer(**common, demonstrations=demonstrations, critic=critic)


def open_reward(config: PPOStage, name: str, inputs: dict[str, Artifact], policy: Any) -> RewardSource:
    """Open a reward by its name among the inputs, and print where its model is.

    A reward model is on the policy's backbone if it can share it, else loaded separately or on a server.
    """
    reward, key = named_rewards(config)[name], reward_key(config, name)
    if reward.is_function:
        return RewardSource(open_function(key, reward))
    label = label_reward(key, reward.source)
    with explain_reward(label):
        source = _open_model(config, name, inputs, policy)
    return source._replace(score=name_reward(source.score, label))


def _open_model(config: PPOStage, name: str, inputs: dict[str, Artifact], policy: Any) -> RewardSource:
    reward = named_rewards(config)[name]
    artifact, problem = inputs[name], "one_backbone: never"
    if config.one_backbone != "never":
        problem = incompatibility(config, inputs["policy"], artifact) or ""
    location = f"loaded beside the policy: {problem}" if problem else "on the backbone of the policy"
    if is_main_process():
        print(f"  {reward.source}: {f'read as {artifact.path}' if reward.is_url else location}", flush=True)

    code = {"trust_remote_code": config.trust_remote_code}
    if not problem:
        label = {"positive_label": reward.positive_label}
        return attach_reward_adapter(policy, artifact, name, reward.length_penalty, **label, **code)
    source = reward_from_model(load_reward(reward, artifact, **code), reward.length_penalty)
    return source._replace(model=None) if reward.is_url else source


def load_trained_policy(
    config: PPOStage, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> Any:
    """Load the SFT policy, ready to train.

    Without `lora:` all of it is trained; with it, a new adapter. If SFT published an adapter, a copy of it is
    trained, and the adapter itself is the frozen reference; with `adapter: merge` it is merged first. Raises
    `UserError` if the policy cannot be trained.
    """
    source = config.policy or ""
    starting_adapter(config, revision)
    policy, lora = load_start(config, source, tokenizer, revision)
    if lora is not None:
        return add_adapter(policy, lora, f"{config.stage}: lora")
    if isinstance(policy, PeftModel):
        add_reference(policy, source, revision)
    return policy


def starting_adapter(config: PPOStage, revision: str | None = None) -> LoraConfig | None:
    """Return the config of the adapter that PPO trains further, or None if it starts from weights.

    Raises `UserError` if PPO would not start from the policy that SFT published: a second adapter, the
    reference, would change the base again.
    """
    source = config.policy or ""
    adapter = continued_adapter(config, source, revision)
    if adapter is not None and (setting := modified_base(adapter)):
        raise UserError(
            f"{source}: its adapter has {setting}, which changes its base, so PPO cannot hold a reference "
            "beside it; run sft with merge: true or another lora.init_lora_weights, or set adapter: merge"
        )
    return adapter


def _trl_trainers() -> ModuleType:
    """Import TRL's trainers, which take seconds to import, only if they are needed."""
    from pipeline.ppo import trl_trainers

    return trl_trainers


def _check_lora_start(config: PPOStage) -> None:
    """Raise `UserError` if PPO would start from another policy than SFT's, because of its new adapter."""
    lora = build_lora_config(config, TaskType.CAUSAL_LM)
    if lora is None:
        return
    setting = modified_base(lora)
    if lora.init_lora_weights is False:  # a random adapter
        setting = "init_lora_weights=False"
    if setting:
        raise UserError(
            f"ppo: lora.{setting} changes the policy before the first step, so PPO would not start from "
            "SFT's; use init_lora_weights: true or gaussian, and no kasa_config"
        )


def _check_backbone(config: PPOStage, name: str, inputs: dict[str, Artifact]) -> None:
    if config.one_backbone == "always":
        problem = incompatibility(config, inputs["policy"], inputs[name])
        if problem:
            source = named_rewards(config)[name].source
            raise UserError(
                f"{source}: one_backbone: always, but {problem}; change that, or set one_backbone: auto"
            )


def _check_scorer_is_held_out(inputs: dict[str, Artifact]) -> None:
    """Raise `UserError` if the scorer has the content of a reward that is trained on."""
    weights = {name: opened.manifest.get("reads", opened.identity) for name, opened in inputs.items()}
    trained = [weights[name] for name in inputs if name.startswith("reward_")]
    if "scorer" in inputs and weights["scorer"] in trained:
        raise UserError(
            f"{inputs['scorer'].path}: evaluation.scorer is a copy of what PPO is trained on; "
            "name a held-out one"
        )


def _evaluation_prompts(prompts: DatasetDict) -> Dataset:
    if len(prompts["validation"]):
        return prompts["validation"]
    return prompts["train"].select(range(min(FALLBACK_EVAL_PROMPTS, len(prompts["train"]))))


def _copy_policies(config: PPOStage, trainer: PolicyTrainer, output: Path, work: Path) -> None:
    """Copy the policies of evaluations to the artifact, and merge all adapters if the config says so.

    They are copied, not moved: if the run is killed now, it needs them again.
    """
    for name in ("best", *([POLICIES] if config.evaluation.keep else [])):
        shutil.copytree(work / name, output / name, ignore=shutil.ignore_patterns(SEAL, ".*"))
    # The last policy is the artifact itself.
    shutil.rmtree(output / POLICIES / f"step-{trainer.state.global_step:06}", ignore_errors=True)

    if config.merge:
        code = {"trust_remote_code": config.trust_remote_code}
        for folder in (output, output / "best", *output.glob(f"{POLICIES}/*")):
            merge_adapter(folder, trainer.processing_class, **code)
