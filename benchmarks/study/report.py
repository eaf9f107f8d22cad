"""Report the study's runs: metrics in `study.json`, tables in `study.md`, plots in `study.svg`.

In `study.json`, `frontier` has the metrics of each seed's policies, `algorithms` those of PPO, RLOO and GRPO.
`trap` has the evaluations of the runs without a KL penalty. Its sections are named for the runs: `trap` (one
reward model), `gold` and `watched` (with a held-out scorer), `ensemble` (four reward models).
"""

import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluate.statistics import fit_curves, overoptimization_curve

ALGORITHMS = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO"}
NO_PENALTY_RUNS = ("trap", "gold", "watched", "ensemble")
HERE = Path(__file__).parent
RESPONSES_PER_ROLLOUT = 64

Row = Sequence[Any]


def write_report(runs: Path, seeds: Sequence[int], fewer_seeds: Sequence[int]) -> None:
    """Write `study.json`, `study.md` and `study.svg`, and print the tables."""
    study: dict[str, Any] = {
        "commit": describe_commit(),
        "frontier": [frontier_metrics(runs, seed) for seed in seeds],
        "trap": [no_penalty_metrics(runs, seed) for seed in fewer_seeds],
        "algorithms": [algorithm_metrics(runs, seed) for seed in fewer_seeds],
    }
    (HERE / "study.json").write_text(json.dumps(study, indent=2) + "\n")
    tables = format_tables(study)
    (HERE / "study.md").write_text(f"At commit {study['commit']}, by `make study`.\n\n{tables}\n")
    print(tables)
    draw_plots(study)


def describe_commit() -> str:
    """Return git's name of the checked-out commit."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


# Metrics


def read_metrics(runs: Path, run: str) -> dict[str, Any]:
    """Return the metrics of a run's evaluation."""
    return dict(json.loads((runs / run / "evaluate" / "metrics.json").read_text()))


def read_log(runs: Path, run: str) -> list[dict[str, Any]]:
    """Return the entries of a run's PPO log in order."""
    with (runs / run / "ppo" / "log.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def frontier_metrics(runs: Path, seed: int) -> dict[str, Any]:
    """Return KL and gold reward of best-of-n and of each PPO policy of one seed.

    `over_best_of_n` is the gold reward of a policy less that of best-of-n at the same KL.
    """
    metrics = read_metrics(runs, f"seed-{seed}")
    pairs = metrics["reward"]["comparisons"]
    best_of_n = [{"n": 1, "kl": 0.0, "gold": metrics["sft"]["gold_reward"]}]
    best_of_n += [
        {"n": int(name.rsplit("_", 1)[1]), "kl": section["kl_bound"], "gold": section["gold_reward"]}
        for name, section in metrics.items()
        if name.startswith("best_of_")
    ]

    policies = []
    for name, section in metrics.items():
        if name.startswith("ppo"):
            policy = {"name": name, "kl": section["kl"], "gold": section["gold_reward"]}
            policy["well_formed"] = section["well_formed"]
            policy["over_best_of_n"] = policy["gold"] - interpolate_gold(best_of_n, policy["kl"])
            policies.append(policy)

    return {
        "seed": seed,
        "accuracy": pairs["accuracy"],
        "ceiling": pairs["accuracy_ceiling"],
        "best_of_n": best_of_n,
        "ppo": policies,
        "fits": metrics["fits"],
    }


def interpolate_gold(best_of_n: Sequence[Mapping[str, float]], kl: float) -> float:
    """Return best-of-n's gold reward at this KL, interpolated between the measured n linearly in √KL."""
    distances = [math.sqrt(point["kl"]) for point in best_of_n]
    golds = [point["gold"] for point in best_of_n]
    return float(np.interp(math.sqrt(max(kl, 0.0)), distances, golds))


def algorithm_metrics(runs: Path, seed: int) -> dict[str, Any]:
    """Return the metrics of each algorithm's last policy, and the numbers of rollouts and response tokens."""
    by_algorithm: dict[str, Any] = {"seed": seed}
    for name in ALGORITHMS:
        run = f"seed-{seed}" if name == "ppo" else f"seed-{seed}-{name}"
        last = read_metrics(runs, run)["ppo"]
        mean_lengths = [
            entry.get("response/tokens", entry.get("completions/mean_length"))
            for entry in read_log(runs, run)
        ]
        mean_lengths = [length for length in mean_lengths if length is not None]
        by_algorithm[name] = {
            "kl": last["kl"],
            "gold": last["gold_reward"],
            "reward": last["reward"],
            "well_formed": last["well_formed"],
            "rollouts": len(mean_lengths),
            "tokens": RESPONSES_PER_ROLLOUT * sum(mean_lengths),
        }
    return by_algorithm


def no_penalty_metrics(runs: Path, seed: int) -> dict[str, Any]:
    """Return the evaluations of one seed's runs without a KL penalty, and where the gold reward peaks."""
    by_run: dict[str, Any] = {"seed": seed}
    for name in NO_PENALTY_RUNS:
        log = read_log(runs, f"seed-{seed}-{name}")
        evaluations = [entry for entry in log if "eval_kl" in entry]
        best = max(evaluations, key=lambda entry: entry["eval_scorer_reward"])
        peak = max(evaluations, key=lambda entry: entry["eval_gold_reward"])
        first, *others = (evaluation_point(entry) for entry in evaluations)
        points = [{"name": "SFT", **first}, *({"name": "", "line": "PPO", **point} for point in others)]
        by_run[name] = {
            "curve": [
                {
                    **{key: entry[f"eval_{key}"] for key in ("kl", "reward", "gold_reward", "scorer_reward")},
                    "step": entry["step"],
                }
                for entry in evaluations
            ],
            "peak": peak["eval_gold_reward"],
            "peak_kl": peak["eval_kl"],
            "best": best["eval_gold_reward"],
            "fit": fit_curves(points)["PPO"]["gold_reward"],
            "turn_kl": kl_at_loss(evaluations),
        }
    return by_run


def evaluation_point(entry: Mapping[str, float]) -> dict[str, float]:
    """Return KL, reward and gold reward of one evaluation in the log."""
    return {name: entry[f"eval_{name}"] for name in ("kl", "reward", "gold_reward")}


def kl_at_loss(evaluations: Sequence[Mapping[str, float]], share: float = 0.1) -> float | None:
    """Return the KL at which the gold reward has first lost `share` of its peak, after the peak.

    It is interpolated linearly between two evaluations, and None if the loss is never reached. It says more
    than the KL of the peak itself, which is mostly chance where the top is flat.
    """
    golds = [entry["eval_gold_reward"] for entry in evaluations]
    threshold = (1 - share) * max(golds)
    peak = golds.index(max(golds))
    for before, after in zip(evaluations[peak:], evaluations[peak + 1 :], strict=False):
        if after["eval_gold_reward"] < threshold:
            ends = sorted((entry["eval_gold_reward"], entry["eval_kl"]) for entry in (before, after))
            return float(np.interp(threshold, *zip(*ends, strict=True)))
    return None


# Tables


def format_tables(study: Mapping[str, Any]) -> str:
    """Return the study's four tables in Markdown."""
    tables = (
        frontier_rows(study["frontier"]),
        algorithm_rows(study["algorithms"]),
        no_penalty_rows(study["trap"]),
        ensemble_rows(study["trap"]),
    )
    return "\n\n".join(map(format_table, tables))


def format_table(rows: Sequence[Row]) -> str:
    """Return rows, the first of which is the head, as a Markdown table; floats get three decimals."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def frontier_rows(seeds: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Compare PPO with best-of-n: one row for each seed, then the medians."""
    head = [
        "seed",
        "accuracy / ceiling",
        "gold: SFT",
        "best-of-16",
        "best-of-64",
        "PPO, last",
        "best checkpoint",
        "its KL",
        "less best-of-16",
        "over best-of-n at its KL",
    ]
    rows: list[Row] = []
    for seed in seeds:
        best = max(seed["ppo"], key=lambda policy: policy["gold"])
        golds = {point["n"]: float(point["gold"]) for point in seed["best_of_n"]}
        rows.append(
            [
                seed["seed"],
                f"{seed['accuracy']:.3f} / {seed['ceiling']:.3f}",
                golds[1],
                golds[16],
                golds[64],
                seed["ppo"][-1]["gold"],
                best["gold"],
                best["kl"],
                best["gold"] - golds[16],
                best["over_best_of_n"],
            ]
        )
    medians = [statistics.median(row[column] for row in rows) for column in range(2, len(head))]
    return [head, *rows, ["median", "", *medians]]


def algorithm_rows(seeds: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Compare PPO, RLOO and GRPO by the medians over seeds."""
    rows: list[Row] = [
        [
            "algorithm",
            "gold, median (each seed)",
            "KL, median",
            "well formed, median",
            "rollouts of 64",
            "response tokens, median",
        ]
    ]
    for name, title in ALGORITHMS.items():
        by_seed = [seed[name] for seed in seeds]
        median = {key: statistics.median(metrics[key] for metrics in by_seed) for key in by_seed[0]}
        golds = ", ".join(f"{metrics['gold']:.3f}" for metrics in by_seed)
        rows.append(
            [
                title,
                f"{median['gold']:.3f} ({golds})",
                median["kl"],
                median["well_formed"],
                int(median["rollouts"]),
                f"{median['tokens']:,.0f}",
            ]
        )
    return rows


def no_penalty_rows(seeds: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Show reward hacking without a KL penalty, and where two held-out scorers stop it."""
    head = [
        "seed",
        "gold at the peak",
        "its KL",
        "gold at the end",
        "reward, peak → end",
        "another seed's reward model",
    ]
    for scorer in ("gold", "other data"):
        head += [f"by {scorer}: stopped at", "gold in best/", "of the peak"]

    rows: list[Row] = [head]
    for seed in seeds:
        run = seed["trap"]
        peak, end = max(run["curve"], key=lambda entry: entry["gold_reward"]), run["curve"][-1]
        row = [seed["seed"], run["peak"], run["peak_kl"], end["gold_reward"]]
        row += [f"{peak[name]:.2f} → {end[name]:.2f}" for name in ("reward", "scorer_reward")]
        for scored in (seed["gold"], seed["watched"]):
            row += [scored["curve"][-1]["step"], scored["best"], f"{scored['best'] / run['peak']:.1%}"]
        rows.append(row)
    return rows


def ensemble_rows(seeds: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Compare one reward model with an ensemble of four, without a KL penalty."""
    columns = ("peak gold", "at KL", "a tenth of it lost at KL", "at the end")
    rows: list[Row] = [["seed", *(f"{size}: {column}" for size in ("one", "four") for column in columns)]]
    for seed in seeds:
        row = [seed["seed"]]
        for run in (seed["trap"], seed["ensemble"]):
            row += [run["peak"], run["peak_kl"], run["turn_kl"], run["curve"][-1]["gold_reward"]]
        rows.append(row)
    return rows


# Plots


def draw_plots(study: Mapping[str, Any]) -> None:
    """Draw `study.svg`: PPO against best-of-n on the left, runs without a KL penalty on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "study",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_frontier(left, study)
        draw_no_penalty(right, study)
        for axes in (left, right):
            axes.legend(frameon=False)
        figure.savefig(HERE / "study.svg", metadata={"Date": None})


def draw_frontier(axes: Any, study: Mapping[str, Any]) -> None:
    """Draw the gold reward of best-of-n and of trained policies against √KL, over all seeds."""
    for index, seed in enumerate(study["frontier"]):
        label = None if index else "best-of-n, n ≤ 64 (KL: upper bound)"
        axes.plot(
            *distances_and_golds(seed["best_of_n"]), "-", color="C0", linewidth=0.7, alpha=0.6, label=label
        )
        label = None if index else "PPO, each checkpoint"
        axes.plot(*distances_and_golds(seed["ppo"]), "o", color="C1", markersize=3, label=label)

    for color, marker, name in (("C2", "D", "rloo"), ("C4", "s", "grpo")):
        policies = [seed[name] for seed in study["algorithms"]]
        label = f"{ALGORITHMS[name]}, last policy"
        axes.plot(*distances_and_golds(policies), marker, color=color, markersize=4, label=label)

    axes.set(
        xlabel="√KL from SFT (√nats)",
        ylabel="gold reward, test prompts",
        title="Gold reward against KL",
    )


def distances_and_golds(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Return √KL and gold reward of each point."""
    return [math.sqrt(point["kl"]) for point in points], [point["gold"] for point in points]


def draw_no_penalty(axes: Any, study: Mapping[str, Any]) -> None:
    """Draw the gold reward against √KL without a KL penalty, with the fitted curves (Gao et al. 2022)."""
    runs = (("C3", "trap", "one reward model"), ("C0", "ensemble", "four, mean − 2 std"))
    for color, name, title in runs:
        for index, seed in enumerate(study["trap"]):
            curve, fit = seed[name]["curve"], seed[name]["fit"]
            distances = [math.sqrt(max(entry["kl"], 0)) for entry in curve]
            golds = [entry["gold_reward"] for entry in curve]
            axes.plot(distances, golds, ".", color=color, markersize=3, alpha=0.6)

            grid = np.linspace(min(distances[1:]), max(distances), 80)
            fitted = [
                fit["start"] + overoptimization_curve(distance, fit["alpha"], fit["beta"], "PPO")
                for distance in grid
            ]
            label = None if index else f"{title}: d(α − β log d)"
            axes.plot(grid, fitted, color=color, linewidth=0.8, label=label)

    axes.set(
        xlabel="√KL from SFT (√nats)",
        ylabel="gold reward, validation prompts",
        title="Reward over-optimization without a KL penalty",
    )
