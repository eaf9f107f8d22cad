"""The running mean and deviation of a reward, for `normalize: running`."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object

ROUNDING = 1e-12  # of the mean: deviations below are those of the sums of equal rewards


@dataclass
class RunningStatistics:
    """The number, the mean and the sum of squared deviations of all rewards of all processes in training.

    `first` is the mean and the deviation of the first batch. Evaluations are normalized by it, so that they
    have one scale.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    first: tuple[float, float] | None = None

    def find_scale(self, rewards: Sequence[float], is_training: bool) -> tuple[float, float]:
        """Return the mean and the deviation by which a batch of rewards is normalized.

        In training these are of all rewards so far, with the batch of all processes; all call it. In an
        evaluation they are `first`. A deviation of 0 counts as 1.
        """
        if is_training or self.first is None:
            batch = _measure(gather_object(list(rewards)))
            if batch.count and self.first is None:
                self.first = (batch.mean, batch.deviation)
            if is_training:
                self._add(batch)
        return (self.mean, self.deviation) if is_training else self.first or (0.0, 1.0)

    @property
    def deviation(self) -> float:
        """The standard deviation, 1 if it is 0 but for rounding."""
        deviation = math.sqrt(self.squares / max(self.count, 1))
        return deviation if deviation > ROUNDING * abs(self.mean) else 1.0

    def _add(self, batch: "RunningStatistics") -> None:
        """Add the statistics of a batch (Chan et al. 1979, "Updating Formulae and a Pairwise Algorithm")."""
        if not batch.count:
            return
        count, delta = self.count + batch.count, batch.mean - self.mean
        self.squares += batch.squares + delta**2 * self.count * batch.count / count
        self.mean += delta * batch.count / count
        self.count = count


def _measure(rewards: Sequence[float]) -> RunningStatistics:
    """Return the statistics of a batch. Both sums are exact, so the order of the rewards does not matter."""
    if not rewards:
        return RunningStatistics()
    mean = statistics.fmean(rewards)
    return RunningStatistics(len(rewards), mean, math.fsum((reward - mean) ** 2 for reward in rewards))
