"""The warm-up of the critic: the first rollouts train it alone, while the policy stays as it is.

With a `critic_warmup_patience` this is the pretraining of VC-PPO (arXiv:2503.01491): the critic is fitted to
the Monte-Carlo returns of the frozen policy. A new rollout is held out until the critic learns from it, so
that the explained variance of its returns tells when there is no more to gain.
"""

import math

import torch
from torch import Tensor

MIN_RISE = 0.005  # a smaller rise of the explained variance counts as none


def initial_warmup(rollouts: int) -> Tensor:
    """Return the state of a warm-up of at most so many `rollouts`, (3,) in fp64.

    It holds the best explained variance, the rollouts since it rose, and the number of warm-up rollouts.
    """
    return torch.tensor([-math.inf, 0.0, rollouts], dtype=torch.float64)


def next_warmup(state: Tensor, explained_variance: float, rollout: int, patience: int) -> Tensor:
    """Return the state after a rollout, given the explained variance before the critic learns from it.

    If that has not risen for `patience` rollouts, this rollout is the last of the warm-up: its number in the
    state is then `rollout + 1`. After the warm-up the state stays.
    """
    best, stale, end = state.tolist()
    if rollout >= end:
        return state
    if explained_variance > best + MIN_RISE:
        best, stale = explained_variance, 0
    else:
        stale += 1
    end = rollout + 1 if stale >= patience else end
    return torch.tensor([best, stale, end], dtype=state.dtype, device=state.device)


def describe_end(state: Tensor, explained_variance: float, rollout: int, patience: int) -> str | None:
    """Return the line that says why the warm-up ends with this rollout; None if it does not end."""
    best, stale, end = state.tolist()
    if rollout + 1 != end:
        return None
    reason = f"the best of {best:.3f} is {patience} rollouts old"
    if stale < patience:
        reason = "critic_warmup_rollouts is reached, and it may still rise"
    return (
        f"rollout {rollout}: the critic's warm-up ends; it explains {explained_variance:.3f} of the variance "
        f"of new returns; {reason}; the policy learns from rollout {rollout + 1}"
    )
