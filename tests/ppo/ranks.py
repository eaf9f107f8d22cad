"""A whitening in two processes."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

WHOLE = torch.arange(24.0).square().reshape(6, 4)  # one half of it lies far above the other


def on_two_ranks(whiten: str, folder: Path) -> list[torch.Tensor]:
    """What `module:function` makes of each half of `WHOLE`, each on a rank of its own."""
    given = [str(folder / "store"), whiten, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, *given], env=environment, check=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def main(store: str, whiten: str, folder: str) -> None:
    """Import the function once and fork two ranks, since the imports take far longer than the whitening."""
    module, name = whiten.split(":")
    function = getattr(import_module(module), name)
    forked = multiprocessing.get_context("fork")
    ranks = [
        forked.Process(target=whiten_half, args=(rank, store, function, Path(folder)), daemon=True)
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def whiten_half(rank: int, store: str, function: Callable[..., torch.Tensor], folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = WHOLE[3 * rank : 3 * rank + 3]
    torch.save(function(half, torch.ones_like(half, dtype=torch.bool)), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
