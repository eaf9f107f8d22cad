"""The plots of the report, as inline SVG whose colours follow the reader's theme."""

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
    from matplotlib.figure import Figure

# matplotlib writes these colours; they become variables that the page's style sheet sets for light and dark
# themes.
THEME = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--line",
    "#040404": "--page",
    "#050505": "--series-0",
    "#060606": "--series-1",
    "#070707": "--series-2",
}
INK, MUTED, LINE, PAGE, *SERIES = THEME
LIGHT = (
    "--page: #fcfcfa; --ink: #1d1f22; --muted: #60656d; --line: #dddcd5; "
    "--series-0: #2a63a5; --series-1: #b4640c; --series-2: #437a48; --less: #fbe3dc; --more: #dcefdd;"
)
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": LINE,
    "figure.facecolor": "none",
    "legend.frameon": False,
}
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "D", "s")
MAX_BINS = 40  # of a histogram

STEP, DISTANCE = "step", "√KL from SFT (√nats)"
KL = ("objective/kl", "eval_objective/kl", "eval_kl")
REWARD_KEYS = {  # the last names are those of TRL's trainers
    "reward": ("objective/raw_scores", "eval_reward", "objective/scores", "eval_objective/scores", "reward"),
    "gold reward": ("eval_gold_reward", "val/gold_reward", "objective/gold_reward"),
    "held-out reward": ("eval_scorer_reward",),
}


class Plot(NamedTuple):
    """A drawn plot: its title and caption as text, the image as an `<svg>` element, and what was drawn."""

    title: str
    caption: str
    svg: str
    figure: Figure | None = None

    def _repr_png_(self) -> bytes | None:
        """Return the image for a notebook, on a light background whatever the notebook's theme."""
        from pipeline.evaluate.images import render_png

        return render_png(self.figure, self.title, self.caption) if self.figure else None

    def __repr__(self) -> str:
        """Return what a terminal shows, without the image."""
        return f"Plot({self.title!r}, {self.caption!r})"


REWARD_KL = (
    "Higher at the same KL is better. Where gold bends down and the reward does not, the reward was "
    "exploited. A hollow mark is best-of-n, whose KL is an upper bound."
)
FITTED = (
    " Curves are d(α − βd) for best-of-n and d(α − β log d) for PPO, d = √KL, fitted to the marks "
    "(Gao et al. 2022)."
)
REWARDS_OF_RESPONSES = (
    "The reward of each response. A hump that moves right is learning; a new spike may be an exploit."
)
LENGTHS = (
    "If PPO's hump is far to the right of SFT's, the policy learned to be long. A spike at the limit "
    "means that responses are cut off."
)
CALIBRATION = (
    "On the diagonal the reward model is right as often as it claims; below it, the model is "
    "overconfident. Larger dots hold more pairs."
)


def metric_column(entries: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[float | None]:
    """Return one value per entry, of the first of `keys` that any entry holds as a number."""
    columns = ([as_finite(entry.get(key)) for entry in entries] for key in keys)
    return next(
        (values for values in columns if any(value is not None for value in values)), [None] * len(entries)
    )


def root_kl(kl: object) -> float | None:
    """Return √KL; None for a KL that is no finite number.

    Rewards bend smoothly in it (Gao et al. 2022, "Scaling laws for reward model overoptimization"). A
    sample of the KL below 0 counts as 0.
    """
    nats = as_finite(kl)
    return None if nats is None else math.sqrt(max(nats, 0))


def root_kls(entries: Sequence[dict[str, Any]]) -> list[float | None]:
    """Return √KL at each entry; an entry that logs no KL takes that of the entry before it."""
    roots: list[float | None] = []
    for entry in entries:
        kl = next((value for key in KL if (value := as_finite(entry.get(key))) is not None), None)
        roots.append(roots[-1] if kl is None and roots else root_kl(kl))
    return roots


def draw_plot(
    name: str, title: str, caption: str, x_label: str, y_label: str, paint: Callable[[Axes], None]
) -> list[Plot]:
    """Draw one plot as inline SVG; return no plot if `paint` drew no data.

    `name` must be unique on the page: it makes the plot's SVG ids distinct, and the same in every run.
    """
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
    # The ids of groups (figure_1, axes_1, …) are the same in every plot.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])
    # A policy that forbids other styles has no style element in an image, which two attributes replace.
    svg = re.sub(r"<defs>\s*<style[^<]*</style>\s*</defs>", "", svg, count=1)
    svg = svg.replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" ', 1)
    svg = re.sub("|".join(THEME), lambda match: f"var({THEME[match[0]]})", svg)
    return [Plot(title, caption, svg, figure)]


def draw_reward_kl(points: Sequence[dict[str, Any]], fits: Mapping[str, Any]) -> list[Plot]:
    """Draw the reward-KL curve of each reward that any point has.

    `points` are those of `metrics.reward_kl_points`, `fits` those of `statistics.fit_curves`.
    """
    plots = []
    for label, key, colour in zip(REWARD_KEYS, REWARDS, SERIES, strict=True):
        of_reward = {line: rewards[key] for line, rewards in fits.items() if key in rewards}
        plots += _draw_reward(label, key, colour, points, of_reward)
    return plots


def _draw_reward(
    label: str, key: str, colour: str, points: Sequence[dict[str, Any]], fits: Mapping[str, Any]
) -> list[Plot]:
    marks = [
        (x, y, point)
        for point in points
        if (x := root_kl(point.get("kl"))) is not None and (y := as_finite(point.get(key))) is not None
    ]

    def paint(axes: Axes) -> None:
        for x, y, point in marks:
            _paint_mark(axes, x, y, point, colour, is_small=is_intermediate(points, point))
        lines = dict.fromkeys(str(point["line"]) for _, _, point in marks if point.get("line"))
        for line, style in zip(lines, LINES, strict=False):
            path = [(x, y) for x, y, point in marks if line in (point.get("line"), point.get("name"))]
            if line in fits:
                path = list(fitted_curve(line, fits[line], min(path)[0], max(path)[0]))
            xs, ys = zip(*path, strict=True)
            axes.plot(xs, ys, color=colour, linewidth=0.8, linestyle=style, label=line, zorder=1)
        axes.margins(x=0.12, y=0.2)

    title = f"{label.capitalize()} against KL"
    caption = REWARD_KL + (FITTED if fits else "")
    return draw_plot(f"reward-KL {title}", title, caption, DISTANCE, label, paint)


def _paint_mark(
    axes: Axes, x: float, y: float, point: Mapping[str, Any], colour: str, *, is_small: bool
) -> None:
    """Mark a policy: hollow if its KL is a bound, small and without a name if others of its line follow."""
    fill = PAGE if point.get("bound") else colour
    axes.scatter(x, y, 9 if is_small else 36, facecolors=fill, edgecolors=colour, zorder=2)
    if not is_small:
        name = str(point.get("name", ""))
        axes.annotate(name, (x, y), (0, 7), textcoords="offset points", horizontalalignment="center")


def fitted_curve(
    line: str, fit: Mapping[str, float], least: float, most: float, parts: int = 60
) -> Iterator[tuple[float, float]]:
    """Yield the points of a fitted line between two measured distances; beyond them a fit says nothing."""
    for part in range(parts + 1):
        x = least + (most - least) * part / parts
        yield x, fit["start"] + overoptimization_curve(x, fit["alpha"], fit["beta"], line)


def is_intermediate(points: Sequence[dict[str, Any]], point: dict[str, Any]) -> bool:
    """Return whether more points of the same line follow, or another point is named like the line."""
    line = [other for other in points if other.get("line") and other.get("line") == point.get("line")]
    return bool(line) and (
        point is not line[-1] or any(other.get("name") == point["line"] for other in points)
    )


def draw_lengths(lengths: Mapping[str, Sequence[int]]) -> list[Plot]:
    """Draw the histogram of response lengths of each policy; return no plot if there are no lengths."""

    def whole_tokens(low: float, high: float) -> list[float]:
        width = math.ceil((high - low + 1) / MAX_BINS)
        return [low - 0.5 + width * i for i in range(math.ceil((high - low + 1) / width) + 1)]

    texts = ("Response length", LENGTHS, "response tokens")
    return _draw_histogram("lengths", *texts, lengths, whole_tokens, integer=True)


def draw_rewards(rewards: Mapping[str, Sequence[float]]) -> list[Plot]:
    """Draw the histogram of the rewards of each policy's responses; return no plot if there are none."""

    def equal_bins(low: float, high: float) -> list[float]:
        width = (high - low) / MAX_BINS or 1.0
        return [low + width * i for i in range(MAX_BINS + 1)]

    texts = ("Reward before and after", REWARDS_OF_RESPONSES, "reward")
    return _draw_histogram("rewards", *texts, rewards, equal_bins, integer=False)


def _draw_histogram(
    name: str,
    title: str,
    caption: str,
    x_label: str,
    columns: Mapping[str, Sequence[Any]],
    bin_edges: Callable[[float, float], list[float]],
    *,
    integer: bool,
) -> list[Plot]:
    """Draw the shares of each column's numbers in bins, whose edges derive from the least and the largest."""

    def paint(axes: Axes) -> None:
        numbers = {
            label: [y for value in values or [] if (y := as_finite(value)) is not None]
            for label, values in columns.items()
        }
        pooled = [value for values in numbers.values() for value in values]
        edges = bin_edges(min(pooled, default=0), max(pooled, default=0))
        axes.locator_params(axis="x", integer=integer)

        style: dict[str, Any] = {"histtype": "step", "linewidth": 1.5}
        for (label, values), colour, line in zip(numbers.items(), cycle(SERIES), cycle(LINES), strict=False):
            if values:
                weights = [1 / len(values)] * len(values)
                axes.hist(values, edges, weights=weights, color=colour, linestyle=line, label=label, **style)

    return draw_plot(name, title, caption, x_label, "share of responses", paint)


def draw_calibration(bins: Sequence[dict[str, Any]]) -> list[Plot]:
    """Draw accuracy against confidence, a dot for each bin; return no plot if no bin has pairs."""

    def paint(axes: Axes) -> None:
        columns = ([as_finite(row.get(key)) for key in ("confidence", "accuracy", "count")] for row in bins)
        points = [(x, y, n) for x, y, n in columns if x is not None and y is not None and n]
        if points:
            xs, ys, counts = zip(*points, strict=True)
            low = min(0.5, *xs, *ys)
            axes.plot([low, 1], [low, 1], color=MUTED, linewidth=0.8, linestyle="--")
            axes.plot(xs, ys, color=SERIES[0], linewidth=1)
            axes.scatter(xs, ys, [12 + 100 * n / max(counts) for n in counts], SERIES[0])

    return draw_plot("calibration", "Calibration", CALIBRATION, "confidence", "accuracy", paint)
