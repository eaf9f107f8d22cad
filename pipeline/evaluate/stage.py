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
from pipeline.config import EvaluateStage, FunctionSection, Reward
from pipeline.distributed.processes import is_main_process
from pipeline.evaluate.metrics import policy_metrics, reward_metrics
from pipeline.evaluate.report import collect_report, write_report
from pipeline.evaluate.rewards import (
    add_references,
    check_functions,
    complete_reward,
    count_references,
    describe_rewards,
    load_rewards,
    open_rewards,
)
from pipeline.evaluate.sampling import load_test_prompts, sample_policies, score_samples
from pipeline.models.loading import load_tokenizer
from pipeline.reward.calls import RewardFunction
from pipeline.reward.functions import load_reward, require_reward, reward_from_model
from pipeline.reward.importing import open_function
from pipeline.reward.named import explain_reward, label_reward, name_reward
from pipeline.training.arguments import check_quantization, resolve_precision


def check(config: EvaluateStage) -> None:
    """Check what the config alone can tell. Raises `UserError`."""
    check_quantization(config.stage, config.quantization)
    resolve_precision(config.precision)
    check_functions(config)
    for _, key, section in named_functions(config):
        open_function(key, section)


def named_functions(config: EvaluateStage) -> list[tuple[str, str, FunctionSection | Reward]]:
    """Return for each function that the config names its column, its key and its section."""
    measures = [(name, f"measures.{name}", section) for name, section in config.measures.items()]
    functions = [("gold_reward", "gold", config.gold), ("well_formed", "well_formed", config.well_formed)]
    return [
        (column, key, section)
        for column, key, section in [*functions, *measures, ("scorer_reward", "scorer", config.scorer)]
        if section and (isinstance(section, FunctionSection) or section.is_function)
    ]


def run(config: EvaluateStage) -> Path:
    """Run the stage and return the folder of its artifact. Raises `UserError`."""
    check(config)
    inputs = open_inputs(config)
    config = complete_reward(config)
    inputs |= open_rewards(config) | {"ppo": inputs.pop("ppo")}
    if config.scorer and not config.scorer.is_function:
        with explain_reward(label_reward("scorer", config.scorer.source)):
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
    score, models, parts = load_rewards(config, inputs)
    tokenizer = load_tokenizer(
        str(inputs["sft"].path),
        revision=inputs["sft"].revision,
        trust_remote_code=config.trust_remote_code,
    )
    prompts = load_test_prompts(config, inputs["records"], tokenizer)
    for model in models.values():
        model.check_prompts(prompts["prompt"], f"{config.records}: test prompts")
    scorers = load_scorers(config, inputs.get("scorer"))

    samples = sample_policies(config, inputs, prompts, count_references(config))
    if "references" in samples:
        add_references(parts, samples.pop("references"), prompts)
    for columns in samples.values():
        columns |= {name: score_samples(scorer, columns, prompts) for name, scorer in scorers.items()}
        columns |= score(columns, prompts)

    metrics: dict[str, Any] = {"reward": reward_metrics(models, inputs, scorers.get("gold_reward"))}
    reliability = metrics["reward"].get("comparisons", {}).pop("calibration", [])
    if not is_main_process():
        return {}
    metrics |= policy_metrics(config, samples) | {"rows": inputs["records"].manifest.get("rows", {})}
    write_json(output / "metrics.json", metrics)
    write_report(output / "report.html", collect_report(config, inputs, metrics, samples, reliability))
    return {"metrics": {name: value for name, value in metrics.items() if name != "rows"}}


def load_scorers(config: EvaluateStage, opened_scorer: Artifact | None) -> dict[str, RewardFunction]:
    """Return by column the scorers that the config names: gold, form, measures and the held-out scorer.

    `opened_scorer` is the model of the held-out scorer, None if it is a function or there is none.
    """
    scorers = {column: open_function(key, section) for column, key, section in named_functions(config)}
    if config.scorer and opened_scorer:
        label = label_reward("scorer", config.scorer.source)
        with explain_reward(label):
            model = load_reward(config.scorer, opened_scorer, trust_remote_code=config.trust_remote_code)
            source = reward_from_model(model, config.scorer.length_penalty)
        scorers["scorer_reward"] = name_reward(source.score, label)
    return scorers
