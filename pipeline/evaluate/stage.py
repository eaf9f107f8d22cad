"""The evaluate stage: measure what the reward model knows and what PPO changed.

In: the artifacts of prepare, sft and ppo, with the intermediate policies that ppo kept, and the rewards that
ppo was trained on: models, servers or functions. All prompts are of the test split.
Out: `metrics.json` and one self-contained `report.html`. Metrics that need a gold reward or a `scorer` are
present only if the config names one.
Wrong input: one `UserError`.
"""

from pathlib import Path
from typing import Any

from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.files import write_json
from pipeline.artifacts.inputs import open_inputs
from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage, Reward
from pipeline.distributed.processes import is_main_process
from pipeline.evaluate.metrics import policy_metrics, reward_metrics
from pipeline.evaluate.report import collect_report, write_report
from pipeline.evaluate.rewards import complete_reward, describe_rewards, load_rewards, open_rewards
from pipeline.evaluate.sampling import load_test_prompts, sample_policies, score_samples
from pipeline.models.loading import load_tokenizer
from pipeline.reward.functions import (
    RewardFunction,
    import_function,
    load_reward,
    require_reward,
    reward_from_model,
)
from pipeline.training.arguments import check_quantization, resolve_precision


def check(config: EvaluateStage) -> None:
    """Check what the config alone can tell. Raises `UserError`."""
    check_quantization(config.stage, config.quantization)
    resolve_precision(config.precision)
    rewards = [*config.reward, *filter(None, [config.scorer])]
    functions = [reward.source for reward in rewards if reward.is_function]
    for spec in filter(None, (config.gold, config.well_formed, *functions, *config.measures.values())):
        import_function(spec)


def run(config: EvaluateStage) -> Path:
    """Run the stage and return the folder of its artifact. Raises `UserError`."""
    check(config)
    inputs = open_inputs(config)
    config = complete_reward(config)
    inputs |= open_rewards(config) | {"ppo": inputs.pop("ppo")}
    if config.scorer and not config.scorer.is_function:
        inputs["scorer"] = require_reward(
            config.scorer, config.make_command("reward"), config.trust_remote_code
        )

    return build_artifact(
        config,
        kind="evaluation",
        inputs=inputs,
        make=lambda output, work: evaluate(config, inputs, output),
        on_every_rank=True,
    )


def evaluate(config: EvaluateStage, inputs: dict[str, Artifact], output: Path) -> dict[str, Any]:
    """Compute all metrics, write both files to `output`, and return the headline metrics."""
    if is_main_process():
        print(f"  reward: {describe_rewards(config)}", flush=True)
    score, models = load_rewards(config, inputs)
    tokenizer = load_tokenizer(
        str(inputs["sft"].path),
        revision=inputs["sft"].revision,
        trust_remote_code=config.trust_remote_code,
    )
    prompts = load_test_prompts(config, inputs["records"], tokenizer)
    for model in models.values():
        model.check_prompts(prompts["prompt"], f"{config.records}: test prompts")
    scorers = load_scorers(config, inputs.get("scorer"))

    samples = sample_policies(config, inputs, prompts)
    for columns in samples.values():
        columns |= {name: score_samples(scorer, columns, prompts) for name, scorer in scorers.items()}
        columns["reward"] = score(columns, prompts)

    metrics: dict[str, Any] = {"reward": reward_metrics(models, inputs, scorers.get("gold_reward"))}
    reliability = metrics["reward"].get("comparisons", {}).pop("calibration", [])
    if not is_main_process():
        return {}
    metrics |= policy_metrics(config, samples) | {"rows": inputs["records"].manifest.get("rows", {})}
    write_json(output / "metrics.json", metrics)
    write_report(output / "report.html", collect_report(config, inputs, metrics, samples, reliability))
    return {"metrics": {name: value for name, value in metrics.items() if name != "rows"}}


def load_scorers(config: EvaluateStage, opened_scorer: Artifact | None) -> dict[str, RewardFunction]:
    """Return by column the scorers that the config names: gold, form, measures and the held-out scorer."""
    specs = {"gold_reward": config.gold, "well_formed": config.well_formed} | config.measures
    scorers = {name: import_function(spec) for name, spec in specs.items() if spec}
    if config.scorer:
        scorers["scorer_reward"] = load_scorer(config, config.scorer, opened_scorer)
    return scorers


def load_scorer(config: EvaluateStage, scorer: Reward, opened: Artifact | None) -> RewardFunction:
    """Load the held-out scorer as a function; `opened` is None for one that is a function already."""
    if opened is None:
        return import_function(scorer.source)
    model = load_reward(scorer, opened, trust_remote_code=config.trust_remote_code)
    return reward_from_model(model, scorer.length_penalty).score
