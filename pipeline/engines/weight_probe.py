"""Tell a server that has the policy of this step from one that has kept an earlier one.

The name of an adapter and the version of weights say what a server was told, not what it computes. So its
log-probabilities of the tokens after fixed rows are compared with the policy's after each update.

Engine and policy never agree to the bit. In bf16 they can differ by more than an update changes, so that
values say nothing, and changes do. With t the policy's log-probabilities and s the server's, both now and
when the server was last seen to follow, Δt and Δs are their changes, and

    share = Δs · Δt / Δt · Δt

is the part of the updates that arrived: 1 if all did, 0 if none did. The server is nearer to the new policy
than to the old one if it is above 1/2. It is judged only if the change is larger than the rounding, rms Δt
above `DECISIVE` times rms (s − t): for a small Llama in bf16 the share was then between 0.85 and 1.15.
Smaller updates add up until they are.

If a server loads a part of an update, rms (s − t) grows. In fp32 it is about 1e-6, so that a part of one in a
hundred is seen.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.engines.policy_server import PolicyServer, request_logprobs
from pipeline.errors import UserError

ROWS, WIDTH = 16, 18  # of the probe; a block of 16 tokens in a cache that was not reset is seen
DECISIVE = 2.0  # smallest rms Δt / rms (s − t) that is judged
MAX_GAP = 1.0  # nats of rms (s − t): bf16 and quantized bases stay below, another model does not
GROWTH, MIN_GAP = 10.0, 1e-3  # rms (s − t) may grow so much over its smallest, and be so large in any case
RESUME = "start it again and run the same command again: it resumes from the last checkpoint"


class Seen(NamedTuple):
    """Log-probabilities of a policy and of a server that has followed it, by row and token id."""

    policy: Tensor
    """(rows, vocabulary)"""
    server: dict[tuple[int, int], float]


class WeightProbe:
    """Compares servers with the policy after fixed rows of token ids, and remembers what it has seen."""

    def __init__(self, policy: Any, forbidden: Sequence[int], longest: int):
        """Choose rows of at most `longest` tokens among the policy's ids that are not forbidden."""
        known = sorted(set(range(policy.config.get_text_config().vocab_size)) - set(forbidden))
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randint(len(known), (ROWS, max(1, min(WIDTH, longest))), generator=generator)
        self.rows: list[list[int]] = [[known[number] for number in row] for row in numbers.tolist()]
        self.seen: dict[str, Seen] = {}  # by URL
        self.gaps: dict[str, float] = {}  # the smallest rms (s − t) so far, by URL

    def read_policy(self, policy: Any) -> Tensor:
        """Return the policy's log-probabilities (rows, vocabulary) of the token after each row."""
        ids = torch.tensor(self.rows, device=policy.device)
        with torch.no_grad():
            logits = policy(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        return logits.float().log_softmax(-1).cpu()

    def check(self, server: PolicyServer, model: str | None, policy: Tensor, timeout: float) -> None:
        """Raise `UserError` if a server is far from the policy, or has not followed its updates.

        `policy` is what `read_policy` returned, and `model` an adapter's name, None for the base.
        """
        rows = enumerate(request_logprobs(server, self.rows, timeout, model))
        now = Seen(policy, {(row, token): value for row, top in rows for token, value in top.items()})
        gap = rms(served_values(now, now) - policy_values(now, now))
        limit = min(MAX_GAP, max(MIN_GAP, GROWTH * self.gaps.get(server.url, MAX_GAP)))
        if not gap < limit:
            raise UserError(
                f"{server.url}: its log-probabilities of {len(now.server)} tokens differ from the policy's "
                f"by {gap:.3g} nats, expected below {limit:.3g}: it serves another model, or has missed an "
                f"update or a part of one; {RESUME}"
            )
        self.gaps[server.url] = min(gap, self.gaps.get(server.url, gap))
        share = applied_share(self.seen.setdefault(server.url, now), now)
        if share is None:
            return
        if not share > 0.5:
            raise UserError(
                f"{server.url}: it follows {share:.0%} of the policy's last updates, expected 100%: it has "
                f"missed one, though it said that it took it; {RESUME}"
            )
        self.seen[server.url] = now


def applied_share(before: Seen, now: Seen) -> float | None:
    """Return the part of the policy's change that a server follows; None if it is within the rounding.

    >>> start = Seen(torch.tensor([[-1.0, -2.0]]), {(0, 0): -1.1, (0, 1): -2.1})
    >>> applied_share(start, Seen(torch.tensor([[-2.0, -3.0]]), {(0, 0): -2.1, (0, 1): -3.1}))
    1.0
    >>> applied_share(start, start._replace(policy=torch.tensor([[-2.0, -3.0]])))
    0.0
    >>> applied_share(start, start._replace(policy=torch.tensor([[-1.1, -2.1]])))
    """
    policy = policy_values(now, before) - policy_values(before, now)
    server = served_values(now, before) - served_values(before, now)
    change, rounding = rms(policy), rms(served_values(before, now) - policy_values(before, now))
    if not change > 0 or change < DECISIVE * rounding:
        return None
    return float(server @ policy / (policy @ policy))


def served_values(seen: Seen, other: Seen) -> Tensor:
    """Return the server's log-probabilities (N,) of the tokens that are in `other` too, fp64."""
    return torch.tensor([seen.server[key] for key in _common(seen, other)], dtype=torch.float64)


def policy_values(seen: Seen, other: Seen) -> Tensor:
    """Return the policy's log-probabilities (N,) of the same tokens, fp64."""
    return torch.tensor([float(seen.policy[key]) for key in _common(seen, other)], dtype=torch.float64)


def rms(values: Tensor) -> float:
    """Return the root of the mean square; it is no number if there are no values."""
    return float(values.square().mean().sqrt())


def _common(seen: Seen, other: Seen) -> list[tuple[int, int]]:
    return sorted(seen.server.keys() & other.server.keys())
