"""What benchmarks share: two sides in turns, each measurement a process of its own; the median over rounds of the ratios within a round."""

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
Found = dict[str, Any]  # of a side: seconds, tokens_per_second, peak_mb, matmul_fraction, …


def compare(
    script: str, work: str, options: list[str], rounds: int, required: float, check: Callable[[str, dict[str, Found]], None],
    peer_path: str | None = None,
) -> None:  # fmt: skip
    """All rounds of one work, kept in `results.json`; `check` refuses sides that did not do the same. Prints one line."""
    found = []
    for number in range(rounds):
        order = ("ours", "peer") if number % 2 == 0 else ("peer", "ours")
        found.append({side: child(script, work, side, options, peer_path if side == "peer" else None) for side in order})
        check(work, found[-1])
    ratio = lambda key: statistics.median(each["ours"][key] / each["peer"][key] for each in found)  # noqa: E731
    result = {
        "required": required, "ratio": ratio("tokens_per_second"), "memory_ratio": ratio("peak_mb"),
        "machine": platform.processor() or platform.machine(), "rounds": found,
    }  # fmt: skip
    keep(work, result)
    print(line(work, result), flush=True)


def child(script: str, work: str, side: str, options: list[str], path: str | None = None) -> Found:
    """One measurement, the JSON in its last line; `path` comes first among the places modules are imported from."""
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    command = [sys.executable, script, work, "--side", side, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def keep(work: str, result: Found) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {work: result}, indent=2) + "\n")


def line(work: str, result: Found) -> str:
    median = lambda side, key: statistics.median(each[side][key] for each in result["rounds"])  # noqa: E731
    both = lambda key, form: " / ".join(format(median(side, key), form) for side in ("ours", "peer"))  # noqa: E731
    figures = f"tokens/s {both('tokens_per_second', ',.0f')}  MB {both('peak_mb', ',.0f')}  of matmul rate {both('matmul_fraction', '.2f')}"
    return f"{work:<16} {result['ratio']:5.2f}× (required {result['required']:.1f}×)  memory {result['memory_ratio']:.2f}×  {figures}"


def measured(run: Callable[[], Found]) -> Found:
    """`run` gives seconds, real_tokens and flops; added are what is made of them, and the peak memory over what is taken so far."""
    import torch

    before, rate = peak_mb(), matmul_rate()
    torch.manual_seed(0)
    found = run()
    found["matmul_fraction"] = found.pop("flops") / found["seconds"] / rate
    return found | {"tokens_per_second": found["real_tokens"] / found["seconds"], "peak_mb": peak_mb() - before, "dtype": "float32"}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matmul_rate() -> float:
    """Floating point operations per second of torch's own product of two 1024² matrices; the best of several."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def weights(model: Any) -> int:
    """Parameters that multiply every token: all but the embeddings."""
    embeddings = sum(p.numel() for name, p in model.named_parameters() if "embed" in name or "wte" in name or "wpe" in name)
    return sum(p.numel() for p in model.parameters()) - embeddings
