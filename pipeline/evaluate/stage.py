"""Evaluation: what the reward model knows and what PPO changed, in `metrics.json` and one self-contained `report.html`.

In: the prepare, sft, reward and ppo artifacts, on prompts of the test split; of ppo also the policies on the way, where it kept them.
Out: the two files. Figures that need a gold reward or a `scorer` are there only where the config names one. A wrong input gets one
`UserError`.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import open_inputs
from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage, Reward
from pipeline.distributed.processes import is_main_process
from pipeline.evaluate.metrics import policy_metrics, reward_metrics
from pipeline.evaluate.report import collect_report, write_report
from pipeline.evaluate.sampling import load_test_prompts, sample_policies, score_samples
from pipeline.reward.functions import (
    RewardFunction,
    import_function,
    load_reward,
    require_reward,
    reward_from_model,
)
from pipeline.reward.model import DistributedRewardModel
from pipeline.training.arguments import check_quantization, resolve_precision


def check(config: EvaluateStage) -> None:
    """Refuse what is wrong with the config alone. Raises `UserError`."""
    check_quantization(config.stage, config.quantization)
    resolve_precision(config.precision)
    scorer = config.scorer.source if config.scorer and config.scorer.is_function else None
    for spec in filter(None, (config.gold, config.well_formed, scorer)):
        import_function(spec)


def run(config: EvaluateStage) -> Path:
    check(config)
    inputs = open_inputs(config)
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
    """Measure, and write the files; returns the headline metrics."""
    options: dict[str, Any] = {
        "revision": inputs["reward"].revision,
        "trust_remote_code": config.trust_remote_code,
    }
    reward = DistributedRewardModel.load(
        inputs["reward"].path, positive_label=config.positive_label, **options
    )
    prompts = load_test_prompts(config, inputs["records"])
    scorers = {
        name: import_function(spec)
        for name, spec in (("gold_reward", config.gold), ("well_formed", config.well_formed))
        if spec
    }
    if config.scorer:
        scorers["scorer_reward"] = load_scorer(config, config.scorer, inputs.get("scorer"))
    sampled = sample_policies(config, inputs, prompts)
    for answers in sampled.values():
        answers |= {name: score_samples(scorer, answers, prompts) for name, scorer in scorers.items()}
        answers["reward"] = reward.score(answers["prompt"], answers["text"])
    metrics: dict[str, Any] = {"reward": reward_metrics(reward, inputs, scorers.get("gold_reward"))}
    reliability = metrics["reward"].get("comparisons", {}).pop("calibration", [])
    if not is_main_process():
        return {}
    metrics |= policy_metrics(config, sampled) | {"rows": inputs["records"].manifest.get("rows", {})}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_report(output / "report.html", collect_report(config, inputs, metrics, sampled, reliability))
    return {"metrics": {name: value for name, value in metrics.items() if name != "rows"}}


def load_scorer(config: EvaluateStage, scorer: Reward, opened: Artifact | None) -> RewardFunction:
    """The held-out scorer, as a function."""
    if opened is None:
        return import_function(scorer.source)
    return reward_from_model(
        load_reward(scorer, opened, trust_remote_code=config.trust_remote_code), scorer.length_penalty
    ).score
