"""Shared parts of the benchmarks: run this project and a peer alternately.

Each measurement has its own process. The result is the median over rounds of the ratio within a round,
because the speed of a machine drifts.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
SIDES = ("ours", "peer")
Measurement = dict[str, Any]  # of one side: seconds, tokens_per_second, peak_mb, matmul_fraction, …
Round = dict[str, Measurement]  # by side


def compare(
    script: str,
    work: str,
    options: list[str],
    rounds: int,
    required: float,
    check: Callable[[str, Round], None],
    peer_path: str | None = None,
) -> None:
    """Run all rounds of one work, save them in `results.json` and print one line.

    `check` stops the benchmark if the two sides of a round did not do the same work.
    """
    measurements: list[Round] = []
    for number in range(rounds):
        order = SIDES if number % 2 == 0 else SIDES[::-1]
        by_side = {
            side: run_side(script, work, side, options, peer_path if side == "peer" else None)
            for side in order
        }
        check(work, by_side)
        measurements.append(by_side)

    result = {
        "required": required,
        "ratio": median_ratio(measurements, "tokens_per_second"),
        "memory_ratio": median_ratio(measurements, "peak_mb"),
        "machine": platform.processor() or platform.machine(),
        "rounds": measurements,
    }
    save_result(work, result)
    print(format_result(work, result), flush=True)


def median_ratio(rounds: list[Round], key: str) -> float:
    """Return the median over rounds of ours ÷ peer."""
    return statistics.median(by_side["ours"][key] / by_side["peer"][key] for by_side in rounds)


def run_side(script: str, work: str, side: str, options: list[str], path: str | None = None) -> Measurement:
    """Run one measurement in its own process and return the JSON of its last line.

    `path`, if given, comes first among the places that modules are imported from.
    """
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    command = [sys.executable, script, work, "--side", side, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def save_result(work: str, result: Measurement) -> None:
    """Write the result of one work to `results.json`, beside those of the others."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {work: result}, indent=2) + "\n")


def format_result(work: str, result: Measurement) -> str:
    """Return the line that `compare` prints: ratios, and the medians of both sides."""

    def format_medians(key: str, spec: str) -> str:
        medians = (statistics.median(by_side[side][key] for by_side in result["rounds"]) for side in SIDES)
        return " / ".join(format(value, spec) for value in medians)

    return (
        f"{work:<16} {result['ratio']:5.2f}× (required {result['required']:.1f}×)"
        f"  memory {result['memory_ratio']:.2f}×"
        f"  tokens/s {format_medians('tokens_per_second', ',.0f')}"
        f"  MB {format_medians('peak_mb', ',.0f')}"
        f"  of matmul rate {format_medians('matmul_fraction', '.2f')}"
    )


def measure_run(run: Callable[[], Measurement]) -> Measurement:
    """Call `run`, which returns `seconds`, `real_tokens`, `flops` and more, and add rates and peak memory.

    The peak memory is what `run` takes above what the process had before.
    """
    import torch

    mb_before, rate = peak_mb(), matmul_rate()
    torch.manual_seed(0)
    measurement = run()
    measurement["matmul_fraction"] = measurement.pop("flops") / measurement["seconds"] / rate
    return measurement | {
        "tokens_per_second": measurement["real_tokens"] / measurement["seconds"],
        "peak_mb": peak_mb() - mb_before,
        "dtype": "float32",
    }


def peak_mb() -> float:
    """Return the peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matmul_rate() -> float:
    """Return the FLOP/s of torch's product of two 1024 × 1024 matrices, the best of eight."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def count_weights(model: Any) -> int:
    """Return the number of parameters that multiply every token: all except the embeddings."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if any(part in name for part in ("embed", "wte", "wpe"))
    )
    return total - embeddings
