"""The curves of a training log: which metrics are drawn, and what a reader sees in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.evaluate.plots import (
    DISTANCE,
    KL,
    LINES,
    MARKERS,
    REWARD_KEYS,
    SERIES,
    STEP,
    Plot,
    draw_plot,
    metric_column,
    root_kls,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRL_REWARD = "rewards/reward_function/"  # mean and deviation of the sum, as TRL's trainers log it
FEW_POINTS = 30  # a curve of fewer points marks each of them


class Curve(NamedTuple):
    """A plot of a training log over `x_label`.

    Each label of `series` is drawn from the first of its log keys that any entry contains.
    """

    title: str
    y_label: str
    series: Mapping[str, tuple[str, ...]]
    caption: str
    x_label: str = STEP


def _supervised(title: str, y_label: str, key: str, caption: str) -> Curve:
    """Return the curve of a metric in training and in validation."""
    return Curve(title, y_label, {"training": (key,), "validation": (f"eval_{key}",)}, caption)


SUPERVISED = (
    _supervised(
        "Loss",
        "loss",
        "loss",
        "Both should fall. If validation rises while training still falls, the model is memorising.",
    ),
    _supervised(
        "Accuracy",
        "share correct",
        "accuracy",
        "How often the reward model agrees with the labels. Judge it by validation; noisy labels keep "
        "even the best model below 1.",
    ),
    _supervised(
        "RMSE",
        "units of the ratings",
        "rmse",
        "How far rewards are from people's ratings. Compare it with the ratings' standard deviation, "
        "which a constant reward would get.",
    ),
    _supervised(
        "AUROC",
        "AUROC",
        "auroc",
        "How often a response of the good class scores higher than one of another class: 1 is always, and"
        " at ½ the reward is no better than a coin.",
    ),
    _supervised(
        "Kendall τ",
        "Kendall τ",
        "kendall_tau",
        "How well the rewards order a prompt's responses as people did: 1 is the same order, 0 is chance."
        " For pairs it is 2 × accuracy − 1.",
    ),
    _supervised(
        "Token accuracy",
        "share of tokens",
        "mean_token_accuracy",
        "How often the next token is predicted correctly. Once validation levels off, more steps no "
        "longer pay.",
    ),
)
POLICY = (
    Curve(
        "Reward",
        "reward",
        REWARD_KEYS,
        "Reward rising while gold falls means the policy is exploiting the reward model.",
    ),
    Curve(
        "Reward against KL",
        "reward",
        REWARD_KEYS,
        "Each mark is a moment in training, from SFT at the left. Where gold bends down under a rising "
        "reward, more KL only buys reward hacking.",
        DISTANCE,
    ),
    Curve(
        "KL",
        "KL (nats)",
        {"KL": KL},
        "How far the policy is from SFT: a climb that levels off is healthy, a sudden jump is not.",
    ),
    Curve(
        "Response length",
        "tokens",
        {"tokens": ("response/tokens", "completions/mean_length", "eval_response_tokens")},
        "Length that grows with the reward often means that the reward is gamed, not earned.",
    ),
    Curve(
        "Entropy",
        "entropy (nats)",
        {"entropy": ("policy/entropy_avg", "objective/entropy", "entropy")},
        "Entropy falling to zero means the policy gives one response, whatever is sampled.",
    ),
    Curve(
        "Clip fraction",
        "share of tokens",
        {"clip fraction": ("policy/clipfrac_avg", "clip_ratio/region_mean")},
        "The share of tokens whose update was clipped: far above 0.2, the steps are too large.",
    ),
    Curve(
        "Value loss",
        "squared error",
        {"value loss": ("loss/value_avg",)},
        "The critic's error. It should fall; it jumps if rewards change faster than the critic learns.",
    ),
    Curve(
        "Explained variance",
        "share of variance",
        {"explained variance": ("val/explained_variance",)},
        "How much of the returns the critic foresees: 1 is all, and at 0 it is no better than their mean.",
    ),
    Curve(
        "Learning rate",
        "learning rate",
        {"learning rate": ("learning_rate",)},
        "The schedule of the optimizer.",
    ),
)


def draw_curves(stage: str, entries: Sequence[dict[str, Any]]) -> list[Plot]:
    """Draw the curves of a stage's training log: a policy's if it logs one, else a supervised model's."""
    is_policy = any(
        key.startswith("objective/") or key in ("eval_kl", "raw_reward") for entry in entries for key in entry
    )
    curves = (*POLICY, *_curves_of_parts(entries)) if is_policy else SUPERVISED
    return [plot for curve in curves for plot in draw_curve(stage, curve, entries)]


def _curves_of_parts(entries: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return a curve for each of several rewards that the log names; TRL logs their sum under such names."""
    keys = dict.fromkeys(key.removeprefix("eval_") for entry in entries for key in entry)
    parts = [key for key in keys if key.startswith("rewards/") and not key.startswith(TRL_REWARD)]
    return [
        Curve(
            f"Reward {key.removeprefix('rewards/')}",
            "reward",
            {"training": (key,), "evaluation": (f"eval_{key}",)},
            "One of the rewards, as it was before its weight. A part that falls is given up for the others.",
        )
        for key in parts
    ]


def draw_curve(stage: str, curve: Curve, entries: Sequence[dict[str, Any]]) -> list[Plot]:
    """Draw one curve of a training log; return no plot if the log has none of its metrics."""

    def paint(axes: Axes) -> None:
        xs = metric_column(entries, (STEP,)) if curve.x_label == STEP else root_kls(entries)
        for (label, keys), colour, line, marker in zip(
            curve.series.items(), SERIES, LINES, MARKERS, strict=False
        ):
            pairs = zip(xs, metric_column(entries, keys), strict=True)
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            style: dict[str, Any] = {"linewidth": 0.5, "marker": marker, "markersize": 4}
            if curve.x_label == STEP:
                is_line = len(points) > 2  # two points have no shape
                marked = "." if is_line else "o"
                style = {
                    "linestyle": line if is_line else "",
                    "marker": marked if len(points) < FEW_POINTS else "",
                }
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=label, **style)

    return draw_plot(
        f"{stage} {curve.title}", curve.title, curve.caption, curve.x_label, curve.y_label, paint
    )
