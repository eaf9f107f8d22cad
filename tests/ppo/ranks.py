"""A whitening in two processes."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch

WHOLE = torch.arange(24.0).square().reshape(6, 4)  # one half of it lies far above the other


def on_two_ranks(whiten: str, folder: Path) -> list[torch.Tensor]:
    """What `module:function` makes of each half of `WHOLE`, each on a rank of its own."""
    given = [str(folder / "store"), whiten, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), *given], env=environment) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def main(rank: int, store: str, whiten: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    module, function = whiten.split(":")
    half = WHOLE[3 * rank : 3 * rank + 3]
    torch.save(getattr(import_module(module), function)(half, torch.ones_like(half, dtype=torch.bool)), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
