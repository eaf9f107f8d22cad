"""The plots of the report, as SVG that follows the theme of the reader."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.evaluate.statistics import REWARDS, overoptimization_curve
from pipeline.formatting.numbers import as_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# matplotlib writes these colours and the page's style sheet says what they are, so that the plots follow the reader's theme.
THEME = {
    "#010101": "--ink", "#020202": "--muted", "#030303": "--line", "#040404": "--page",
    "#050505": "--series-0", "#060606": "--series-1", "#070707": "--series-2",
}  # fmt: skip

INK, MUTED, LINE, PAGE, *SERIES = THEME

LIGHT = (
    "--page: #fcfcfa; --ink: #1d1f22; --muted: #60656d; --line: #dddcd5; --series-0: #2a63a5; --series-1: #b4640c; --series-2: #437a48; "
    "--less: #fbe3dc; --more: #dcefdd;"
)

STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": LINE,
    "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "grid.color": LINE, "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "figure.facecolor": "none", "legend.frameon": False,
}  # fmt: skip

LINES = ("-", "--", ":", "-.")

MARKERS = ("o", "D", "s")

STEP, DISTANCE = "step", "√KL from SFT (√nats)"

KL = ("objective/kl", "eval_objective/kl", "eval_kl")

REWARD_KEYS = {  # the last names are those of TRL's trainers
    "reward": ("objective/raw_scores", "eval_reward", "objective/scores", "eval_objective/scores", "reward"),
    "gold reward": ("eval_gold_reward", "val/gold_reward", "objective/gold_reward"),
    "held-out reward": ("eval_scorer_reward",),
}


class Curve(NamedTuple):
    """A plot of a training log: each label is drawn from the first of its log keys that any entry holds, over `x_label`."""

    title: str
    y_label: str
    series: Mapping[str, tuple[str, ...]]
    caption: str
    x_label: str = STEP


class Plot(NamedTuple):
    title: str
    caption: str
    svg: str

    def _repr_html_(self) -> str:
        """What a notebook shows: a light ground, whatever its theme."""
        style = f"{LIGHT} max-width: 30rem; padding: 1rem; background: var(--page); color: var(--ink)"
        return f'<figure style="{style}"><b>{self.title}</b>{self.svg}<figcaption>{self.caption}</figcaption></figure>'


SUPERVISED = (
    Curve("Loss", "loss", {"training": ("loss",), "validation": ("eval_loss",)},
          "Both should fall; validation turning up while training still falls means the model is memorising."),
    Curve("Accuracy", "share of answers", {"training": ("accuracy",), "validation": ("eval_accuracy",)},
          "How often the reward model agrees with the labels: judge by validation, as noisy labels keep the best model below 1."),
    Curve("RMSE", "units of the ratings", {"training": ("rmse",), "validation": ("eval_rmse",)},
          "How far rewards are from people's ratings: judge it by the ratings' standard deviation, which is what a constant would get."),
    Curve("AUROC", "AUROC", {"training": ("auroc",), "validation": ("eval_auroc",)},
          "How often an answer of the good class outscores one of another: 1 is always, and at ½ the reward is no better than a coin."),
    Curve("Kendall τ", "Kendall τ", {"training": ("kendall_tau",), "validation": ("eval_kendall_tau",)},
          "How far the rewards order a prompt's answers as people did: 1 is the same order, 0 chance; of pairs it is 2 × accuracy − 1."),
    Curve("Token accuracy", "share of tokens", {"training": ("mean_token_accuracy",), "validation": ("eval_mean_token_accuracy",)},
          "How often the next token is guessed right: validation levelling off says when more steps stop paying."),
)  # fmt: skip

POLICY = (
    Curve("Reward", "reward", REWARD_KEYS, "Reward rising while gold falls means the policy is exploiting the reward model."),
    Curve("Reward against KL", "reward", REWARD_KEYS,
          "Each mark is a moment in training, from SFT at the left: where gold bends down under a rising reward, KL only buys exploits.",
          DISTANCE),
    Curve("KL", "KL (nats)", {"KL": KL}, "How far the policy is from SFT: a climb that levels off is healthy, a sudden jump is not."),
    Curve("Response length", "tokens", {"tokens": ("response/tokens", "completions/mean_length", "eval_response_tokens")},
          "Length that grows with the reward is often the reward being gamed, not earned."),
    Curve("Entropy", "entropy (nats)", {"entropy": ("policy/entropy_avg", "objective/entropy", "entropy")},
          "Entropy falling to zero means the policy gives one answer, whatever is sampled."),
    Curve("Clip fraction", "share of tokens", {"clip fraction": ("policy/clipfrac_avg", "clip_ratio/region_mean")},
          "The share of tokens whose update was clipped: far above 0.2, the steps are too large."),
)  # fmt: skip

FRONTIER = (
    "Higher at the same KL is better; gold that bends down where the reward does not was exploited. A hollow mark, of best-of-n, has an "
    "upper bound for its KL."
)

FITTED = " Curves are d(α − βd) for best-of-n and d(α − β log d) for PPO, d = √KL, fitted to the marks (Gao et al. 2022)."

LENGTHS = "A hump of PPO far to the right of SFT's says that it learned to be long; a spike at the limit, that answers are cut off."

CALIBRATION = "On the diagonal the reward model is right as often as it claims, below it too sure of itself; larger dots hold more pairs."


def metric_column(entries: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[float | None]:
    """One value per entry, of the first of `keys` that any entry holds as a number."""
    columns = ([as_finite(entry.get(key)) for entry in entries] for key in keys)
    return next(
        (values for values in columns if any(value is not None for value in values)), [None] * len(entries)
    )


def root_kl(kl: object) -> float | None:
    """√KL, in which rewards bend smoothly (Gao et al. 2022, "Scaling laws for reward model overoptimization"); below 0 it is noise."""
    nats = as_finite(kl)
    return None if nats is None else math.sqrt(max(nats, 0))


def root_kls(entries: Sequence[dict[str, Any]]) -> list[float | None]:
    """√KL at each entry; where it logs none, that of the entry before it."""
    roots: list[float | None] = []
    for entry in entries:
        kl = next((value for key in KL if (value := as_finite(entry.get(key))) is not None), None)
        roots.append(roots[-1] if kl is None and roots else root_kl(kl))
    return roots


def draw_plot(
    name: str, title: str, caption: str, x_label: str, y_label: str, paint: Callable[[Axes], None]
) -> list[Plot]:
    """One plot as inline SVG; none where `paint` found nothing to draw. `name` keeps the plots' ids apart, and the same in every run."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc
        style: Any = STYLE | {"svg.hashsalt": name}
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(4.8, 3), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        paint(axes)
        if not axes.has_data():
            return []
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside upper left", ncols=3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(
        r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :]
    )  # figure_1, axes_1, … are the same in every plot
    return [Plot(title, caption, re.sub("|".join(THEME), lambda match: f"var({THEME[match[0]]})", svg))]


def draw_curves(stage: str, entries: Sequence[dict[str, Any]]) -> list[Plot]:
    is_policy = any(
        key.startswith("objective/") or key in ("eval_kl", "raw_reward") for entry in entries for key in entry
    )
    return [
        plot for curve in (POLICY if is_policy else SUPERVISED) for plot in draw_curve(stage, curve, entries)
    ]


def draw_curve(stage: str, curve: Curve, entries: Sequence[dict[str, Any]]) -> list[Plot]:
    def paint(axes: Axes) -> None:
        xs = metric_column(entries, (STEP,)) if curve.x_label == STEP else root_kls(entries)
        for (label, keys), colour, line, marker in zip(
            curve.series.items(), SERIES, LINES, MARKERS, strict=False
        ):
            points = [
                (x, y)
                for x, y in zip(xs, metric_column(entries, keys), strict=True)
                if x is not None and y is not None
            ]
            few: dict[str, Any] = {"linestyle": line, "marker": "." if len(points) < 30 else ""}
            trail: dict[str, Any] = {"linewidth": 0.5, "marker": marker, "markersize": 4}
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=label,
                    **(few if curve.x_label == STEP else trail),
                )

    return draw_plot(
        f"{stage} {curve.title}", curve.title, curve.caption, curve.x_label, curve.y_label, paint
    )


def draw_frontier(points: Sequence[dict[str, Any]], fits: Mapping[str, Any]) -> list[Plot]:
    """A plot for each reward that any point has."""
    return [
        plot
        for label, key, colour in zip(REWARD_KEYS, REWARDS, SERIES, strict=True)
        for plot in draw_reward(
            label,
            key,
            colour,
            points,
            {line: of_line[key] for line, of_line in fits.items() if key in of_line},
        )
    ]


def draw_reward(
    label: str, key: str, colour: str, points: Sequence[dict[str, Any]], fits: Mapping[str, Any]
) -> list[Plot]:
    marks = [
        (x, y, point)
        for point in points
        if (x := root_kl(point.get("kl"))) is not None and (y := as_finite(point.get(key))) is not None
    ]

    def paint(axes: Axes) -> None:
        for x, y, point in marks:
            fill = PAGE if point.get("bound") else colour
            axes.scatter(
                x,
                y,
                9 if is_intermediate(points, point) else 36,
                facecolors=fill,
                edgecolors=colour,
                zorder=2,
            )
            if not is_intermediate(points, point):
                axes.annotate(
                    str(point.get("name", "")),
                    (x, y),
                    (0, 7),
                    textcoords="offset points",
                    rotation=40,
                    rotation_mode="anchor",
                )
        lines = dict.fromkeys(str(point["line"]) for _, _, point in marks if point.get("line"))
        for line, style in zip(lines, LINES, strict=False):
            ends = [(x, y) for x, y, point in marks if line in (point.get("line"), point.get("name"))]
            if line in fits:
                ends = list(fitted_curve(line, fits[line], min(ends)[0], max(ends)[0]))
            axes.plot(
                *zip(*ends, strict=True), color=colour, linewidth=0.8, linestyle=style, label=line, zorder=1
            )
        axes.margins(x=0.12, y=0.2)

    title = f"{label.capitalize()} against KL"
    return draw_plot(f"frontier {title}", title, FRONTIER + (FITTED if fits else ""), DISTANCE, label, paint)


def fitted_curve(
    line: str, fit: Mapping[str, float], least: float, most: float, parts: int = 60
) -> Iterator[tuple[float, float]]:
    """The points of a fitted line between two distances: where nothing was measured a fit says nothing."""
    for part in range(parts + 1):
        x = least + (most - least) * part / parts
        yield x, fit["start"] + overoptimization_curve(x, fit["alpha"], fit["beta"], line)


def is_intermediate(points: Sequence[dict[str, Any]], point: dict[str, Any]) -> bool:
    """Whether more points of the same line follow, or the line leads to one that stands alone."""
    line = [each for each in points if each.get("line") and each.get("line") == point.get("line")]
    return bool(line) and (point is not line[-1] or any(each.get("name") == point["line"] for each in points))


def draw_lengths(lengths: dict[str, Sequence[int]]) -> list[Plot]:
    def paint(axes: Axes) -> None:
        counts = {
            name: [y for value in values or [] if (y := as_finite(value)) is not None]
            for name, values in lengths.items()
        }
        every = [value for values in counts.values() for value in values]
        low, high = min(every, default=0), max(every, default=0)
        width = math.ceil((high - low + 1) / 40)  # whole tokens a bin, at most 40 bins
        edges = [low - 0.5 + width * i for i in range(math.ceil((high - low + 1) / width) + 1)]
        axes.locator_params(axis="x", integer=True)
        for (name, values), colour, line in zip(counts.items(), cycle(SERIES), cycle(LINES), strict=False):
            if values:
                shares = [1 / len(values)] * len(values)
                axes.hist(
                    values,
                    edges,
                    weights=shares,
                    histtype="step",
                    color=colour,
                    linestyle=line,
                    linewidth=1.5,
                    label=name,
                )

    return draw_plot("lengths", "Response length", LENGTHS, "response tokens", "share of answers", paint)


def draw_calibration(bins: Sequence[dict[str, Any]]) -> list[Plot]:
    def paint(axes: Axes) -> None:
        numbers = ([as_finite(each.get(key)) for key in ("confidence", "accuracy", "count")] for each in bins)
        points = [(x, y, n) for x, y, n in numbers if x is not None and y is not None and n]
        if points:
            xs, ys, counts = zip(*points, strict=True)
            low = min(0.5, *xs, *ys)
            axes.plot([low, 1], [low, 1], color=MUTED, linewidth=0.8, linestyle="--")
            axes.plot(xs, ys, color=SERIES[0], linewidth=1)
            axes.scatter(xs, ys, [12 + 100 * n / max(counts) for n in counts], SERIES[0])

    return draw_plot("calibration", "Calibration", CALIBRATION, "confidence", "accuracy", paint)
