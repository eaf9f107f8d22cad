"""What the notebooks use: run a command, open an artifact, read what it contains and draw its plots.

The functions take artifacts that `open_artifact` returned. Torch is imported only by the functions that
need it.

    from pipeline.notebook import draw_curves, open_artifact, run_rlhf

    run_rlhf("run", "--recipe", "demo", "--until", "ppo")
    draw_curves(open_artifact("runs/demo/ppo", "the cell above"), "Reward", "KL")
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.cli import main
from pipeline.config import RECIPES, Source
from pipeline.data.records import open_records
from pipeline.errors import UserError
from pipeline.evaluate import curves, plots
from pipeline.evaluate.plots import Plot
from pipeline.formatting.tables import metric_tables
from pipeline.prepare import demo
from pipeline.prepare.demo import gold_reward
from pipeline.reward.metrics import calibration, calibration_error, pair_accuracy

__all__ = [
    "RECIPES",
    "calibration",
    "calibration_error",
    "demo_records",
    "draw_calibration",
    "draw_curves",
    "draw_reward_kl",
    "gold_reward",
    "metric_tables",
    "open_artifact",
    "open_records",
    "pair_accuracy",
    "read_log",
    "read_metrics",
    "run_rlhf",
    "sample_responses",
]

ARTIFACT_KINDS = {
    "prepare": "records",
    "sft": "policy",
    "reward": "reward",
    "ppo": "policy",
    "evaluate": "evaluation",
}


def run_rlhf(*arguments: str) -> None:
    """Run a command of `rlhf`: `run_rlhf("run", "--recipe", "demo")` is `rlhf run --recipe demo`.

    Raises `UserError` for a mistake in the arguments or inputs. A notebook shows it as one line and stops.
    """
    main([*arguments, "--debug"])


def open_artifact(folder: str | Path, made_by: str) -> Artifact:
    """Open the artifact in `runs/<run>/<stage>`; its `path` is the folder, its `manifest` a dict.

    `made_by` is the cell or the command that makes the artifact. Raises `UserError`, one line with the
    folder and `made_by`, if the artifact is missing, half-written or altered, or if `folder` is not named
    for a stage.
    """
    stage = Path(folder).name
    if stage not in ARTIFACT_KINDS:
        stages = ", ".join(ARTIFACT_KINDS)
        raise UserError(
            f"{folder}: expected runs/<run>/<stage>, with one of the stages {stages}; run: {made_by}"
        )

    return require_artifact(folder, ARTIFACT_KINDS[stage], made_by)


def read_metrics(artifact: Artifact) -> dict[str, Any]:
    """Return the metrics.json of a reward model (a section for each kind of records) or of an evaluation."""
    return dict(json.loads((artifact.path / "metrics.json").read_text(encoding="utf-8")))


def read_log(artifact: Artifact) -> list[dict[str, float]]:
    """Return the entries of a trained stage's log.jsonl in order; none if the artifact has no log."""
    from pipeline.evaluate import report

    return report.read_log(artifact)


def draw_curves(artifact: Artifact, *titles: str) -> list[Plot]:
    """Draw the training curves of an artifact: those with these titles in this order, or all of them.

    Raises `UserError` for a title that no curve of its log has.
    """
    drawn = {plot.title: plot for plot in curves.draw_curves(artifact.path.name, read_log(artifact))}
    for title in titles:
        if title not in drawn:
            expected = ", ".join(drawn) or "none"
            raise UserError(f"{artifact.path}: no curve {title!r} in its log; expected one of: {expected}")

    return [drawn[title] for title in titles or drawn]


def draw_reward_kl(evaluation: Artifact) -> list[Plot]:
    """Draw the reward, then the gold reward, of SFT, best-of-n and PPO against the KL from SFT."""
    from pipeline.evaluate.metrics import reward_kl_points

    metrics = read_metrics(evaluation)
    return plots.draw_reward_kl(reward_kl_points(metrics), metrics["fits"])


def draw_calibration(reward: Artifact) -> list[Plot]:
    """Draw how often a reward model is right about held-out pairs against how sure its scores claim to be."""
    return plots.draw_calibration(read_metrics(reward)["comparisons"]["calibration"])


def sample_responses(
    policy: Artifact,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    temperature: float = 0.7,
    response_tokens: int = 40,
    max_prompt_tokens: int = 80,
) -> list[str]:
    """Sample one response to each prompt, at most `response_tokens` tokens long.

    The same seed gives the same responses. A prompt over `max_prompt_tokens` is truncated on the left.
    """
    from pipeline.models import generation
    from pipeline.models.loading import load_sampler

    model, tokenizer = load_sampler(str(policy.path))
    batches = generation.sample_responses(
        model,
        tokenizer,
        prompts,
        range(len(prompts)),
        seed=seed,
        temperature=temperature,
        response_tokens=response_tokens,
        max_prompt_tokens=max_prompt_tokens,
        batch_size=8,
    )
    return [text for batch in batches for text in batch.texts]


def demo_records(kind: str, seed: int = 0) -> list[dict[str, Any]]:
    """Return the demo world's records of one kind, such as `ratings`, with the few rows that are unusable."""
    generated = demo.rows(Source(format="demo"), seed)
    return [record for record_kind, record in generated if record_kind == kind]
