"""Tell a server that has the policy of this step from one that has kept an earlier one.

The name of an adapter and the version of weights say what a server was told, not what it computes. So its
log-probabilities of fixed tokens are compared with the policy's after each update.

Engine and policy never agree to the bit. In bf16 they can differ by more than an update changes, so that
values say nothing, and changes do. With t the policy's log-probabilities and s the server's, both now and
when the server was last seen to follow, Δt and Δs are their changes, and

    share = Δs · Δt / Δt · Δt

is the part of the updates that arrived: 1 if all did, 0 if none did. The server is nearer to the new policy
than to the old one if it is above 1/2. Rounding moves it by about 0.1 / (rms Δt / rms (s − t)), as measured
with a small Llama in bf16, so that it is judged from `DECISIVE` on. Smaller updates are within the rounding;
they add up until they are not.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.engines.policy_server import PolicyServer, request_logprobs
from pipeline.errors import UserError
from pipeline.models.logprobs import response_logprobs

ROWS, WIDTH = 8, 17  # of the probe: a row has one token more than log-probabilities
DECISIVE = 2.0  # smallest rms Δt / rms (s − t) that is judged
MAX_GAP = 1.0  # nats of rms (s − t): bf16 and quantized bases stay below, another model does not
RESUME = "start it again and run the same command again: it resumes from the last checkpoint"


class Seen(NamedTuple):
    """Log-probabilities (N,) of the policy and of a server that has followed it, fp64."""

    policy: Tensor
    server: Tensor


class WeightProbe:
    """Compares servers with the policy on fixed rows of token ids, and remembers what it has seen."""

    def __init__(self, policy: Any, forbidden: Sequence[int], longest: int):
        """Choose rows of at most `longest` tokens among the policy's ids that are not forbidden."""
        known = sorted(set(range(policy.config.get_text_config().vocab_size)) - set(forbidden))
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randint(len(known), (ROWS, max(2, min(WIDTH, longest))), generator=generator)
        self.rows: list[list[int]] = [[known[number] for number in row] for row in numbers.tolist()]
        self.seen: dict[str, Seen] = {}  # by URL

    def read_policy(self, policy: Any) -> Tensor:
        """Return the policy's log-probabilities (N,) of all tokens but the first of each row."""
        ids = torch.tensor(self.rows, device=policy.device)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            stats = response_logprobs(policy, ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:])
        return stats.logprobs.flatten().double().cpu()

    def check(self, server: PolicyServer, model: str | None, policy: Tensor, timeout: float) -> None:
        """Raise `UserError` if a server is far from the policy, or has not followed its updates.

        `policy` is what `read_policy` returned, and `model` an adapter's name, None for the base.
        """
        served = torch.tensor(request_logprobs(server, self.rows, timeout, model), dtype=torch.float64)
        gap = rms(served - policy)
        if not gap < MAX_GAP:
            raise UserError(
                f"{server.url}: its log-probabilities of {len(served)} fixed tokens differ from the policy's "
                f"by {gap:.3g} nats, expected below {MAX_GAP:g}: it serves another model or has missed an "
                f"update; {RESUME}"
            )
        seen = self.seen.setdefault(server.url, Seen(policy, served))
        share = applied_share(seen, Seen(policy, served))
        if share is None:
            return
        if not share > 0.5:
            raise UserError(
                f"{server.url}: it follows {share:.0%} of the policy's last updates, expected 100%: it has "
                f"missed one, though it said that it took it; {RESUME}"
            )
        self.seen[server.url] = Seen(policy, served)


def applied_share(before: Seen, after: Seen) -> float | None:
    """Return the part of the policy's change that a server follows; None if it is within the rounding.

    >>> start = Seen(torch.tensor([-1.0, -2.0]), torch.tensor([-1.1, -2.1]))
    >>> applied_share(start, Seen(torch.tensor([-2.0, -3.0]), torch.tensor([-2.1, -3.1])))
    1.0
    >>> applied_share(start, start._replace(policy=torch.tensor([-2.0, -3.0])))
    0.0
    >>> applied_share(start, start._replace(policy=torch.tensor([-1.1, -2.1])))
    """
    policy, server = after.policy - before.policy, after.server - before.server
    change, rounding = rms(policy), rms(before.server - before.policy)
    if change == 0 or change < DECISIVE * rounding:
        return None
    return float(server @ policy / (policy @ policy))


def rms(values: Tensor) -> float:
    """Return the root of the mean square."""
    return float(values.square().mean().sqrt())
