"""The sampler of PPO's rollouts that asks vLLM servers, with the signature of `generation.generate`."""

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.engines.policy_server import (
    PolicyServer,
    Sampled,
    check_processed_logprobs,
    probe_policy_server,
    request_responses,
    sampling_fields,
    served_names,
)
from pipeline.engines.weight_probe import WeightProbe
from pipeline.engines.weights import INITIAL, check_version
from pipeline.errors import UserError
from pipeline.models.ends import end_token_ids
from pipeline.models.generation import Responses, to_responses, unknown_ids

Result = TypeVar("Result")

MAX_PROMPTS = 1024  # that vLLM accepts in a request


class Sync(Protocol):
    """Brings the policy of a step to all servers."""

    def update(self, step: int, write: Callable[[Path], None]) -> tuple[str | None, str]:
        """Bring all servers to `step`; return the adapter's name, None for the base, and the base's version.

        `write` publishes the policy in a folder. All ranks call both.
        """


class EngineSampler:
    """Samples responses on servers; their random numbers are the servers' own, so that `uniforms` are unread.

    The prompts of a call are shared out over the servers. `rank` is that of this process: its first prompts
    go to the server of this number.
    """

    def __init__(
        self, servers: Sequence[PolicyServer], timeout: float, sync: Sync | None = None, rank: int = 0
    ):
        first = rank % len(servers)
        self.servers = [*servers[first:], *servers[:first]]
        self.timeout, self.sync = timeout, sync
        self.model: str | None = None  # the name of the policy on the servers; None is their base
        self.version: str | None = None  # that the weights of their base must have, if it is known
        self.probe: WeightProbe | None = None
        self.has_new_weights = False  # that were not compared with the policy yet

    def update(self, step: int, write: Callable[[Path], None]) -> None:
        """Bring all servers to the policy of `step`; see `Sync.update`."""
        if self.sync is not None:
            served = self.sync.update(step, write)
            self.has_new_weights |= served != (self.model, self.version)
            self.model, self.version = served

    def __call__(
        self,
        policy: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        uniforms: Tensor,
        temperature: float = 1.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_response_tokens: int = 0,
        stop_token: str | None = None,
        batch_size: int = 64,
        ends: Sequence[int] = (),
    ) -> Responses:
        """Sample one response of at most T tokens to each prompt; `uniforms` (B, T) gives only the T.

        The arguments mean the same as in `generate`; a server forms its own batches. `policy` tells only the
        ends, the vocabulary and the device. Raises `UserError` if a server does not send what was asked for.
        """
        tokens = uniforms.shape[1]
        ends = list(dict.fromkeys([*end_token_ids(policy, tokenizer, stop_token), *ends]))
        forbidden = unknown_ids(policy, tokenizer)
        sampling = sampling_fields(
            tokens,
            ends=ends,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_tokens=min_response_tokens,
            forbidden=forbidden,
        )
        longest = max(map(len, prompts)) + tokens
        _check_room(self.servers, longest)
        if self.has_new_weights:
            self.probe = self.probe or WeightProbe(policy, forbidden, longest - 1)
            self._compare_weights(policy, self.probe)
        sampled = self._request(prompts, sampling)
        _check_allowed(sampled, forbidden)

        responses = to_responses(tokenizer, prompts, [ids for ids, _ in sampled], ends, policy.device)
        logprobs = pad_numbers([values for _, values in sampled], responses.response_ids.shape[1])
        responses.sampler_logprobs = logprobs.to(policy.device)
        return responses

    def _compare_weights(self, policy: Any, probe: WeightProbe) -> None:
        """Raise `UserError` if a server has not the weights that it was brought last."""
        logprobs = probe.read_policy(policy)
        for server in self.servers:
            self.check_server_version(server)
            probe.check(server, self.model, logprobs, self.timeout)
        self.has_new_weights = False

    def check_server_version(self, server: PolicyServer) -> None:
        if self.version is not None and server.reload:
            check_version(server, self.version, self.timeout)

    def _request(self, prompts: Sequence[list[int]], sampling: dict[str, Any]) -> list[Sampled]:
        """Ask all servers at once, each for its share of the responses."""
        parts = share_out(len(prompts), len(self.servers), MAX_PROMPTS)
        jobs = [
            lambda server=self.servers[index], rows=rows: request_responses(
                server, prompts[rows.start : rows.stop], sampling, self.timeout, self.model
            )
            for index, rows in parts
        ]
        sampled = [response for part in run_at_once(jobs) for response in part]
        for index in dict(parts):  # a server that was started again meanwhile has sampled from other weights
            self.check_server_version(self.servers[index])
        return sampled


def open_served_policy(url: str, policy: str, timeout: float) -> EngineSampler:
    """Return the sampler of a server that serves this policy: a folder or hub id, as its base or an adapter.

    Raises `UserError` if the server does not answer, or serves others.
    """
    server = probe_policy_server(url, timeout)
    check_processed_logprobs(server, timeout)
    names = served_names(server, timeout)
    served = [name for name, path in names.items() if policy in (name, path) or _is_same(path, policy)]
    if not served:
        raise UserError(
            f"{url}: serves {', '.join(path or name for name, path in names.items())}, expected {policy}; "
            f"start one with: vllm serve {policy} --logprobs-mode processed_logprobs"
        )
    sampler = EngineSampler([server], timeout)
    sampler.model, sampler.version = served[0], INITIAL  # not what a run has loaded there since
    sampler.check_server_version(server)
    return sampler


def _is_same(path: str, folder: str) -> bool:
    return Path(folder).exists() and Path(path).resolve() == Path(folder).resolve()


def share_out(count: int, shares: int, largest: int) -> list[tuple[int, range]]:
    """Split range(count) into equal parts, one or more for each share, none above `largest` and none empty.

    Returns the number of its share with each part.

    >>> share_out(7, 2, 2)
    [(0, range(0, 2)), (0, range(2, 4)), (1, range(4, 6)), (1, range(6, 7))]
    """
    ends = [-(-count * (share + 1) // shares) for share in range(shares)]
    return [
        (share, range(start, min(start + largest, end)))
        for share, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
        for start in range(first, end, largest)
    ]


def run_at_once(jobs: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run jobs in threads of their own and return their results; the first error is raised at once."""
    if len(jobs) == 1:
        return [jobs[0]()]
    outcomes: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def work(number: int) -> None:
        try:
            outcomes.put((number, jobs[number](), None))
        except BaseException as error:  # it is raised below
            outcomes.put((number, None, error))

    for number in range(len(jobs)):
        threading.Thread(target=work, args=(number,), daemon=True, name="request to an engine").start()
    results: dict[int, Result] = {}
    while len(results) < len(jobs):
        number, results[number], error = outcomes.get()
        if error is not None:
            raise error
    return [results[number] for number in range(len(jobs))]


def _check_room(servers: Sequence[PolicyServer], longest: int) -> None:
    """Raise `UserError` if a server's rows are too short: it would cut the responses."""
    for server in servers:
        if 0 < server.tokens < longest:
            raise UserError(
                f"{server.url}: accepts {server.tokens} tokens, but a prompt and response have {longest}; "
                f"start it with --max-model-len {longest}, or lower response_tokens or max_prompt_tokens"
            )


def _check_allowed(sampled: Sequence[Sampled], forbidden: Sequence[int]) -> None:
    """Raise `UserError` if a response has an id that the tokenizer does not know."""
    if unknown := {token for ids, _ in sampled for token in ids} & set(forbidden):
        raise UserError(f"the engine sampled the id {min(unknown)}, which the policy's tokenizer lacks")


def pad_numbers(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Return the rows as (B, width), padded by zeros on the right."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])
