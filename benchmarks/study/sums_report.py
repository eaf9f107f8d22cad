"""Report the arms on the world of sums: `sums.json`, `sums.md` and `sums.svg`.

The gold reward is the share of right final answers to the validation prompts, which no arm trains on. Its
intervals are over seeds: Student's t at 95 %.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from report import HERE, Row, describe_commit, format_table, read_log
from scipy import stats
from sums import ARMS

UPDATES_PER_ROLLOUT = 4
REFERENCE = "rloo"  # arms are compared with its final share
COLORS = ("C0", "C9", "C4", "C6", "C5", "C1", "C3", "k", "C2", "C7")


def write_sums_report(runs: Path, seeds: Sequence[int]) -> None:
    """Write `sums.json`, `sums.md` and `sums.svg`, and print the table."""
    curves = {name: [read_curve(runs, f"sums-{seed}-{name}") for seed in seeds] for name in ARMS}
    study = {"commit": describe_commit(), "seeds": list(seeds), "curves": curves}
    (HERE / "sums.json").write_text(json.dumps(study, indent=2) + "\n")
    table = format_table(arm_rows(curves))
    origin = f"At commit {study['commit']}, by `make study ARGS='--only sums'`."
    (HERE / "sums.md").write_text(f"{origin}\n\n{table}\n")
    print(table)
    draw_curves(curves)


def read_curve(runs: Path, run: str) -> list[dict[str, float]]:
    """Return the rollouts, the gold reward and the KL of each evaluation of a run."""
    points = {  # by step: the last one is evaluated twice
        entry["step"]: {
            "rollouts": entry["step"] // UPDATES_PER_ROLLOUT,
            "gold": entry["eval_gold_reward"],
            "kl": entry["eval_kl"],
        }
        for entry in read_log(runs, run)
        if "eval_gold_reward" in entry
    }
    return list(points.values())


def rollouts_to_reach(curve: Sequence[Mapping[str, float]], share: float) -> float | None:
    """Return the rollouts of the first evaluation with at least this share of right answers, else None."""
    return next((point["rollouts"] for point in curve if point["gold"] >= share), None)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % interval (Student's t) over seeds."""
    margin = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(margin)


def arm_rows(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> list[Row]:
    """Compare the arms: final share of right answers, and rollouts to reach that of RLOO on the same seed."""
    head = ["arm", "right answers at the end, median (each seed)", "less RLOO's on the same seed, mean"]
    head += ["at half the rollouts, median", "rollouts to RLOO's final share, each seed", "KL, median"]
    rows: list[Row] = [list(head)]
    targets = [curve[-1]["gold"] for curve in curves[REFERENCE]]
    for name, arm in ARMS.items():
        finals = [curve[-1]["gold"] for curve in curves[name]]
        mean, margin = mean_interval(np.subtract(finals, targets).tolist())
        reached = [rollouts_to_reach(*pair) for pair in zip(curves[name], targets, strict=True)]
        rows.append(
            [
                arm.title,
                f"{statistics.median(finals):.3f} ({', '.join(f'{final:.3f}' for final in finals)})",
                "–" if name == REFERENCE else f"{mean:+.3f} ± {margin:.3f}",
                statistics.median(curve[len(curve) // 2]["gold"] for curve in curves[name]),
                ", ".join("–" if rollouts is None else f"{rollouts:.0f}" for rollouts in reached),
                statistics.median(curve[-1]["kl"] for curve in curves[name]),
            ]
        )
    return rows


def draw_curves(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> None:
    """Draw `sums.svg`: the share of right answers against rollouts, with intervals over seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "sums", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots()
        for color, (name, arm) in zip(COLORS, ARMS.items(), strict=True):
            rollouts = [point["rollouts"] for point in curves[name][0]]
            golds = np.array([[point["gold"] for point in curve] for curve in curves[name]])
            means, margins = zip(*map(mean_interval, golds.T), strict=True)
            low, high = np.subtract(means, margins), np.add(means, margins)
            axes.plot(rollouts, means, ".-", color=color, linewidth=1.2, label=arm.title.replace("`", ""))
            axes.fill_between(rollouts, low, high, color=color, alpha=0.08, linewidth=0)
        axes.set(
            xlabel="rollouts of 64 responses",
            ylabel="right final answers, validation prompts",
            title=f"Chains of sums: mean and 95 % interval over {len(curves[REFERENCE])} seeds",
        )
        figure.legend(frameon=False, loc="outside right upper")
        figure.savefig(HERE / "sums.svg", metadata={"Date": None})
