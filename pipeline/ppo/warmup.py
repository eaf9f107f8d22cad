"""The warm-up of the critic: the first rollouts train it alone, while the policy stays as it is.

With a `critic_warmup_patience` this is the pretraining of VC-PPO (arXiv:2503.01491): the critic is fitted to
the Monte-Carlo returns of the frozen policy. A new rollout is held out until the critic learns from it, so
that the variance of its returns that the critic explains tells when there is no more to gain.

R² measures it. The usual explained variance is blind to the mean of the values, which a critic learns first:
it stays at 0 meanwhile, and the warm-up would end before the critic knows anything else.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MIN_RISE = 0.005  # a smaller rise of R² counts as none


def initial_warmup(rollouts: int) -> Tensor:
    """Return the state of a warm-up of at most so many `rollouts`, (3,) in fp64.

    It holds the best R², the rollouts since it rose, and the number of warm-up rollouts.
    """
    return torch.tensor([-math.inf, 0.0, rollouts], dtype=torch.float64)


def next_warmup(state: Tensor, r_squared: float, rollout: int, patience: int) -> Tensor:
    """Return the state after a rollout, given R² before the critic learns from it.

    If that has not risen for `patience` rollouts, this rollout is the last of the warm-up: its number in the
    state is then `rollout + 1`. After the warm-up the state stays.
    """
    best, stale, end = state.tolist()
    if rollout >= end:
        return state
    if r_squared > best + MIN_RISE:
        best, stale = r_squared, 0
    else:
        stale += 1
    end = rollout + 1 if stale >= patience else end
    return torch.tensor([best, stale, end], dtype=state.dtype, device=state.device)


def describe_end(state: Tensor, metrics: Mapping[str, float], rollout: int, patience: int) -> str | None:
    """Return the line that says why the warm-up ends with this rollout; None if it does not end.

    `metrics` are those of the rollout, before the critic learns from it.
    """
    best, stale, end = state.tolist()
    if rollout + 1 != end:
        return None
    reason = f"the best R², {best:.3f}, is {patience} rollouts old"
    if stale < patience:
        reason = "critic_warmup_rollouts is reached, and R² may still rise"
    return (
        f"rollout {rollout}: the critic's warm-up ends; on new returns its explained variance is "
        f"{metrics['val/explained_variance']:.3f} and its R² {metrics['val/r_squared']:.3f}; {reason}; "
        f"the policy learns from rollout {rollout + 1}"
    )
