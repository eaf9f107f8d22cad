"""What the study's runs say: tables, figures and plots."""

import json
import math
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluate.statistics import fit_curves, overoptimization_curve

ALGORITHMS = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO"}
HERE = Path(__file__).parent


def report(runs: Path, seeds: Sequence[int], fewer: Sequence[int]) -> None:
    """Write `study.json`, `study.md` and `study.svg`; print the tables."""
    found = {"commit": commit(), "frontier": [of_seed(runs, seed) for seed in seeds], "trap": [of_trap(runs, seed) for seed in fewer]}
    found["algorithms"] = [compared(runs, seed) for seed in fewer]
    (HERE / "study.json").write_text(json.dumps(found, indent=2) + "\n")
    text = "\n\n".join(map(table, (frontier_rows(found), algorithm_rows(found), trap_rows(found), ensemble_rows(found))))
    (HERE / "study.md").write_text(f"At commit {found['commit']}, by `make study`.\n\n{text}\n")
    print(text)
    draw(found)


def commit() -> str:
    return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE).stdout.strip()


def metrics_of(runs: Path, run: str) -> dict[str, Any]:
    return dict(json.loads((runs / run / "evaluate" / "metrics.json").read_text()))


def of_seed(runs: Path, seed: int) -> dict[str, Any]:
    """The seed's frontier: best-of-n and PPO's policies, each with KL and gold reward, and what PPO gained over best-of-n at its KL."""
    metrics = metrics_of(runs, f"seed-{seed}")
    pairs = metrics["reward"]["comparisons"]
    sampled = [{"n": 1, "kl": 0.0, "gold": metrics["sft"]["gold_reward"]}]
    sampled += [{"n": int(name.rsplit("_", 1)[1]), "kl": of_n["kl_bound"], "gold": of_n["gold_reward"]}
                for name, of_n in metrics.items() if name.startswith("best_of_")]  # fmt: skip
    trained = [{"name": name, "kl": of["kl"], "gold": of["gold_reward"], "well_formed": of["well_formed"]}
               for name, of in metrics.items() if name.startswith("ppo")]  # fmt: skip
    for policy in trained:
        policy["over_best_of_n"] = policy["gold"] - at(sampled, policy["kl"])
    return {
        "seed": seed, "accuracy": pairs["accuracy"], "ceiling": pairs["accuracy_ceiling"], "best_of_n": sampled, "ppo": trained,
        "fits": metrics["fits"],
    }  # fmt: skip


def at(sampled: Sequence[dict[str, float]], kl: float) -> float:
    """Best-of-n's gold reward at this KL, between the n measured: straight lines over √KL."""
    return float(np.interp(math.sqrt(max(kl, 0.0)), [math.sqrt(point["kl"]) for point in sampled], [point["gold"] for point in sampled]))


def compared(runs: Path, seed: int) -> dict[str, Any]:
    """The last policy of each algorithm, and how many answers and tokens it was trained on."""
    found: dict[str, Any] = {"seed": seed}
    for name in ALGORITHMS:
        run = f"seed-{seed}" if name == "ppo" else f"seed-{seed}-{name}"
        last = metrics_of(runs, run)["ppo"]
        drawn = [entry.get("response/tokens", entry.get("completions/mean_length")) for entry in log(runs, run)]
        lengths = [length for length in drawn if length is not None]
        found[name] = {"kl": last["kl"], "gold": last["gold_reward"], "reward": last["reward"], "well_formed": last["well_formed"],
                       "rollouts": len(lengths), "tokens": 64 * sum(lengths)}  # fmt: skip
    return found


def of_trap(runs: Path, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"seed": seed}
    for name in ("trap", "gold", "watched", "ensemble"):
        entries = [entry for entry in log(runs, f"seed-{seed}-{name}") if "eval_kl" in entry]
        found[name] = {"curve": [{key: entry[f"eval_{key}"] for key in ("kl", "reward", "gold_reward", "scorer_reward")}
                                 | {"step": entry["step"]} for entry in entries]}  # fmt: skip
        best = max(entries, key=lambda entry: entry["eval_scorer_reward"])
        peak = max(entries, key=lambda entry: entry["eval_gold_reward"])
        found[name] |= {"peak": peak["eval_gold_reward"], "peak_kl": peak["eval_kl"], "best": best["eval_gold_reward"]}
        points = [{"name": "SFT", **entry_point(entries[0])}, *({"name": "", "line": "PPO", **entry_point(entry)} for entry in entries[1:])]
        fit = fit_curves(points)["PPO"]["gold_reward"]
        found[name] |= {"fit": fit, "turn_kl": lost_at(entries)}
    return found


def lost_at(entries: Sequence[dict[str, float]], share: float = 0.1) -> float | None:
    """The KL at which gold has lost this share of its peak for the first time after it, on a straight line between two evaluations: the
    peak's own place is noise where the top is flat."""
    golds = [entry["eval_gold_reward"] for entry in entries]
    first = golds.index(max(golds))
    for before, after in zip(entries[first:], entries[first + 1 :], strict=False):
        if after["eval_gold_reward"] < (1 - share) * max(golds):
            ends = sorted((entry["eval_gold_reward"], entry["eval_kl"]) for entry in (before, after))
            return float(np.interp((1 - share) * max(golds), *zip(*ends, strict=True)))
    return None


def entry_point(entry: dict[str, float]) -> dict[str, float]:
    return {"kl": entry["eval_kl"], "reward": entry["eval_reward"], "gold_reward": entry["eval_gold_reward"]}


def log(runs: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / run / "ppo" / "log.jsonl").open(encoding="utf-8")]


# What is shown

Row = Sequence[Any]


def table(rows: Sequence[Row]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in line)} |" for line in lines)


def gold_of(seed: dict[str, Any], n: int) -> float:
    return float(next(point["gold"] for point in seed["best_of_n"] if point["n"] == n))


def frontier_rows(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [["seed", "accuracy / ceiling", "gold: SFT", "best-of-16", "best-of-64", "PPO, last", "best checkpoint", "its KL",
                        "less best-of-16", "over best-of-n at its KL"]]  # fmt: skip
    for seed in found["frontier"]:
        best = max(seed["ppo"], key=lambda policy: policy["gold"])
        rows.append([
            seed["seed"], f"{seed['accuracy']:.3f} / {seed['ceiling']:.3f}", gold_of(seed, 1), gold_of(seed, 16), gold_of(seed, 64),
            seed["ppo"][-1]["gold"], best["gold"], best["kl"], best["gold"] - gold_of(seed, 16), best["over_best_of_n"],
        ])  # fmt: skip
    return [*rows, ["median", "", *(statistics.median(row[i] for row in rows[1:]) for i in range(2, 10))]]


def algorithm_rows(found: dict[str, Any]) -> list[Row]:
    head = ["algorithm", "gold, median (each seed)", "KL, median", "well formed, median", "rollouts of 64", "answer tokens, median"]
    rows: list[Row] = [head]
    for name, title in ALGORITHMS.items():
        of_seeds = [seed[name] for seed in found["algorithms"]]
        median = {key: statistics.median(of[key] for of in of_seeds) for key in of_seeds[0]}
        each = ", ".join(f"{of['gold']:.3f}" for of in of_seeds)
        rows.append([title, f"{median['gold']:.3f} ({each})", median["kl"], median["well_formed"], int(median["rollouts"]),
                     f"{median['tokens']:,.0f}"])  # fmt: skip
    return rows


def trap_rows(found: dict[str, Any]) -> list[Row]:
    watchers = [column for name in ("gold", "other data") for column in (f"by {name}: stopped at", "gold in best/", "of the peak")]
    rows: list[Row] = [
        ["seed", "gold at the peak", "its KL", "gold at the end", "reward, peak → end", "another seed's reward model", *watchers]
    ]
    for seed in found["trap"]:
        trap = seed["trap"]
        peak, end = max(trap["curve"], key=lambda entry: entry["gold_reward"]), trap["curve"][-1]
        moves = [f"{peak[name]:.2f} → {end[name]:.2f}" for name in ("reward", "scorer_reward")]
        gold = [trap["peak"], trap["peak_kl"], end["gold_reward"]]
        stops = [[seed[name]["curve"][-1]["step"], seed[name]["best"], f"{seed[name]['best'] / trap['peak']:.1%}"]
                 for name in ("gold", "watched")]  # fmt: skip
        rows.append([seed["seed"], *gold, *moves, *stops[0], *stops[1]])
    return rows


def ensemble_rows(found: dict[str, Any]) -> list[Row]:
    columns = ["peak gold", "at KL", "a tenth of it lost at KL", "at the end"]
    rows: list[Row] = [["seed", *(f"{many}: {column}" for many in ("one", "four") for column in columns)]]
    for seed in found["trap"]:
        of_both = [[seed[name][key] for key in ("peak", "peak_kl", "turn_kl")] + [seed[name]["curve"][-1]["gold_reward"]]
                   for name in ("trap", "ensemble")]  # fmt: skip
        rows.append([seed["seed"], *of_both[0], *of_both[1]])
    return rows


def draw(found: dict[str, Any]) -> None:
    """Left, the frontier over all seeds; right, the trap with one reward model and with four."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "study", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, seed in enumerate(found["frontier"]):
            xs, ys = zip(*((math.sqrt(point["kl"]), point["gold"]) for point in seed["best_of_n"]), strict=True)
            left.plot(xs, ys, "-", color="C0", linewidth=0.7, alpha=0.6, label=None if number else "best-of-n, n ≤ 64 (bound)")
            xs, ys = zip(*((math.sqrt(point["kl"]), point["gold"]) for point in seed["ppo"]), strict=True)
            left.plot(xs, ys, "o", color="C1", markersize=3, label=None if number else "PPO, each checkpoint")
        for colour, marker, name in (("C2", "D", "rloo"), ("C4", "s", "grpo")):
            xs, ys = zip(*((math.sqrt(seed[name]["kl"]), seed[name]["gold"]) for seed in found["algorithms"]), strict=True)
            left.plot(xs, ys, marker, color=colour, markersize=4, label=f"{ALGORITHMS[name]}, at the end")
        for colour, name, title in (("C3", "trap", "one reward model"), ("C0", "ensemble", "four, less two deviations")):
            for number, seed in enumerate(found["trap"]):
                curve, fit = seed[name]["curve"], seed[name]["fit"]
                xs = [math.sqrt(max(entry["kl"], 0)) for entry in curve]
                right.plot(xs, [entry["gold_reward"] for entry in curve], ".", color=colour, markersize=3, alpha=0.6)
                grid = np.linspace(min(xs[1:]), max(xs), 80)
                fitted = [fit["start"] + overoptimization_curve(x, fit["alpha"], fit["beta"], "PPO") for x in grid]
                right.plot(grid, fitted, color=colour, linewidth=0.8, label=None if number else f"{title}: d(α − β log d)")
        left.set(xlabel="√KL from SFT (√nats)", ylabel="gold reward, test prompts", title="What is bought at which distance")
        right.set(xlabel="√KL from SFT (√nats)", ylabel="gold reward, validation prompts", title="No KL penalty: the turn")
        for axes in (left, right):
            axes.legend(frameon=False)
        figure.savefig(HERE / "study.svg", metadata={"Date": None})
