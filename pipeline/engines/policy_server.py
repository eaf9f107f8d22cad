"""Client of a vLLM server that samples from the policy: prompts as token ids in, responses as token ids out.

In: the ids of prompts, and how to sample. `POST /v1/completions` gets them with `return_token_ids`, and with
`logprobs: 0`, which is the log-probability of the sampled token alone.
Out: the ids of each response, with the token that ends it, and the server's log-probability of each id.
They are those of the distribution that was sampled from only under `--logprobs-mode processed_logprobs`.

Errors: a server that does not answer, serves another model, or sends a response that is neither complete nor
ended raises one `UserError` with the URL, what was found and what was expected. Lost connections and 5xx are
retried until `timeout`, an incomplete response twice.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from pipeline.engines.requests import FAIL_FAST, Reply, send_request
from pipeline.errors import UserError

START_COMMAND = "start one with: vllm serve POLICY --logprobs-mode processed_logprobs"
ABOUT: dict[str, Any] = {"hint": START_COMMAND, "key": "POLICY"}
MAX_INFO = 4_000_000  # bytes of what a server reports of itself
MAX_NAME = 1_000  # characters of a model's name
TOKEN_BYTES = 1_000  # of a token of a response: its text twice, its id and its log-probability
TRIES = 1_000  # `timeout` ends them: a large model takes minutes to start again
ATTEMPTS = 3  # to get a complete response
TOP = 20  # log-probabilities of a token that a server sends at most, unless it was started otherwise
NOT_FINITE = -9999.0  # what vLLM sends for a log-probability of -inf
MIN_TEMPERATURE = 0.01  # vLLM raises a lower one to it
FORBID = -100.0  # the lowest bias that vLLM adds to a logit

RELOAD_ROUTES = ("/collective_rpc", "/pause", "/update_weight_version")

WRONG_SHAPE = (ValueError, TypeError, KeyError, IndexError, AttributeError)  # of a parser, for another JSON

Sampled = tuple[list[int], list[float]]  # ids of a response, and the log-probability of each


class PolicyServer(NamedTuple):
    """What a server reports of itself: its base model's name and path, and the tokens of its longest row.

    `lora` and `reload` say whether it accepts new adapters and new weights while it runs. `tokens` is 0 if
    it is not reported.
    """

    url: str
    model: str
    path: str
    tokens: int = 0
    lora: bool = False
    reload: bool = False


def probe_policy_server(url: str, timeout: float) -> PolicyServer:
    """Return the server at `url`; `timeout` is in seconds. Raises `UserError` if it does not generate."""
    url = url.rstrip("/")
    reply = _get(url + "/v1/models", timeout)
    with suppress(*WRONG_SHAPE):
        base = next(model for model in reply.json()["data"] if not model.get("parent"))
        if not _has_route(url, "/v1/completions", timeout):
            raise UserError(f"{url}: serves {base['id']}, but generates nothing; {START_COMMAND}")
        return PolicyServer(
            url,
            model=_as_name(base["id"]),
            path=_as_name(base.get("root") or base["id"]),
            tokens=int(base.get("max_model_len") or 0),
            lora=_has_lora(url, timeout),
            reload=all(_has_route(url, route, timeout) for route in RELOAD_ROUTES),
        )
    raise UserError(f"{url}: is no vLLM server: /v1/models {reply.preview()}; {START_COMMAND}")


def served_names(server: PolicyServer, timeout: float) -> dict[str, str]:
    """Return path by name of all models that a server has now: its base, and adapters. Raises `UserError`."""
    reply = _get(server.url + "/v1/models", timeout)
    with suppress(*WRONG_SHAPE):
        return {_as_name(entry["id"]): str(entry.get("root") or "") for entry in reply.json()["data"]}
    raise UserError(f"{server.url}: is no vLLM server: /v1/models {reply.preview()}; {START_COMMAND}")


def check_processed_logprobs(server: PolicyServer, timeout: float) -> None:
    """Raise `UserError` if the server's log-probabilities are not those that it sampled from.

    With top-k 1 the sampled token has probability 1, and its log-probability is 0; the model's own is lower.
    """
    sampling = sampling_fields(1, ends=(), top_k=1, temperature=1.0)
    ((_, logprobs),) = request_responses(server, [[1]], sampling, timeout)
    if logprobs[0] != 0:
        raise UserError(
            f"{server.url}: sends log-probabilities of the model, not of the distribution that it samples "
            "from; start it with --logprobs-mode processed_logprobs"
        )


def sampling_fields(
    max_tokens: int,
    *,
    ends: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens: int = 0,
    forbidden: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the fields of a request that mean what they do in `pipeline.models.generation.generate`.

    Every field is named, since a server fills the others from its model's generation config. `ends` alone end
    a response; the ids `forbidden` are never sampled. Raises `UserError` for a temperature that vLLM changes.
    """
    if temperature < MIN_TEMPERATURE:
        raise UserError(
            f"temperature={temperature:g}: vLLM samples at {MIN_TEMPERATURE} or more; raise it, or remove "
            "'rollouts:'"
        )
    return {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {str(token): FORBID for token in forbidden},
        "ignore_eos": True,
        "stop_token_ids": list(ends),
        "n": 1,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }


def request_responses(
    server: PolicyServer,
    prompts: Sequence[Sequence[int]],
    sampling: dict[str, Any],
    timeout: float,
    model: str | None = None,
) -> list[Sampled]:
    """Return the ids of a response to each prompt, and the server's log-probability of each id.

    `sampling` are `sampling_fields`; `model` is an adapter's name, None for the base. Raises `UserError` if
    the server does not send a whole response to each prompt.
    """
    model, url = model or server.model, server.url + "/v1/completions"
    body = {"model": model, "prompt": list(map(list, prompts)), **sampling}
    ids = sum(map(len, prompts)) + len(prompts) * sampling["max_tokens"]
    problem = ""
    for _ in range(ATTEMPTS):
        reply = send_request(url, timeout, MAX_INFO + TOKEN_BYTES * ids, body, TRIES, **ABOUT)
        if reply.status != 200:
            raise UserError(f"{url}: {_explain_status(reply, model)}")
        try:
            return _parse_responses(reply.json(), prompts, sampling, model)
        except WRONG_SHAPE as error:
            problem = f"{error}" if type(error) is ValueError else reply.preview()
    expected = f"{len(prompts)} responses of up to {sampling['max_tokens']} token ids"
    raise UserError(f"{url}: {problem}; expected {expected}, in each of {ATTEMPTS} tries")


def request_logprobs(
    server: PolicyServer, rows: Sequence[Sequence[int]], timeout: float, model: str | None = None
) -> list[dict[int, float]]:
    """Return the server's log-probabilities of the likeliest ids after each row, at temperature 1, by id.

    `model` is an adapter's name, None for the base. Raises `UserError` if the server does not send them.
    """
    model, url = model or server.model, server.url + "/v1/completions"
    fields = sampling_fields(1, ends=()) | {"logprobs": TOP}
    body = {"model": model, "prompt": list(map(list, rows)), **fields}
    reply = send_request(url, timeout, MAX_INFO, body, TRIES, **ABOUT)
    if reply.status != 200:
        raise UserError(f"{url}: {_explain_status(reply, model)}")
    with suppress(*WRONG_SHAPE):
        choices = {choice["index"]: choice for choice in reply.json()["choices"]}
        logprobs = [_parse_top(choices[number]["logprobs"]["top_logprobs"]) for number in range(len(rows))]
        if all(value <= 0 for row in logprobs for value in row.values()):
            return logprobs
    raise UserError(f"{url}: {reply.preview()}; expected 'top_logprobs' of {len(rows)} responses of one id")


def _parse_top(tokens: Any) -> dict[int, float]:
    """Return log-probability by id of the only token, without those that are not finite."""
    (entries,) = tokens
    values = {int(key.removeprefix("token_id:")): float(value) for key, value in entries.items()}
    return {token: value for token, value in values.items() if value > NOT_FINITE}


def _parse_responses(
    reply: Any, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], model: str
) -> list[Sampled]:
    """Return ids and log-probabilities by prompt. Raises an error of `WRONG_SHAPE` if one is not whole."""
    if reply["model"] != model:
        raise ValueError(f"answers as the model {str(reply['model'])[:100]!r}, not {model!r}")
    choices = {choice["index"]: choice for choice in reply["choices"]}
    if len(choices) != len(reply["choices"]) or choices.keys() != set(range(len(prompts))):
        raise ValueError(f"sends {len(reply['choices'])} responses")
    return [_parse_choice(i, choices[i], list(prompt), sampling) for i, prompt in enumerate(prompts)]


def _parse_choice(row: int, choice: Any, prompt: list[int], sampling: dict[str, Any]) -> Sampled:
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if choice["prompt_token_ids"] != prompt:
        raise ValueError(f"response {row} is to another prompt")
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"response {row} has ids that are no token ids")
    if len(logprobs) != len(ids) or not all(NOT_FINITE < float(value) <= 0 for value in logprobs):
        raise ValueError(f"response {row} has {len(ids)} ids, but not a finite log-probability of each")
    has_ended = bool(ids) and ids[-1] in sampling["stop_token_ids"]
    if not ids or not (has_ended or len(ids) == sampling["max_tokens"]) or len(ids) > sampling["max_tokens"]:
        raise ValueError(
            f"response {row} has {len(ids)} of {sampling['max_tokens']} tokens and none that ends it, by the "
            f"reason {str(choice.get('finish_reason'))[:40]!r}"
        )
    return ids, list(map(float, logprobs))


def _explain_status(reply: Reply, model: str) -> str:
    """Return what a status other than 200 means, and what to do."""
    if reply.status == 404:
        return (
            f"{reply.preview()}; expected the model {model!r}: the server was started again, or missed an "
            "update; run the same command again: it resumes from the last checkpoint and loads the policy"
        )
    return f"{reply.preview()}; expected responses; {START_COMMAND}"


def _get(url: str, timeout: float) -> Reply:
    return send_request(url, timeout, MAX_INFO, tries=FAIL_FAST, **ABOUT)


def _has_route(url: str, route: str, timeout: float) -> bool:
    """Return whether a server has a route that is only posted to: it then refuses to be read from."""
    return _get(url + route, timeout).status == 405


def _has_lora(url: str, timeout: float) -> bool:
    """Return whether adapters can be loaded: the route for them is there, and LoRA is switched on.

    Only a server with LoRA has the metric; one that hides its metrics tells at the first adapter.
    """
    if not _has_route(url, "/v1/load_lora_adapter", timeout):
        return False
    metrics = _get(url + "/metrics", timeout)
    return metrics.status != 200 or b"vllm:lora_requests_info" in metrics.data


def _as_name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise ValueError("is no name")
    return value
