"""Engines that serve classifiers: who answers at a URL, and the logits of rows by its wire format.

vLLM (`vllm serve MODEL --runner pooling`), `POST /classify`: rows of token ids, `use_activation: false` (which every version that takes ids
knows). Text-embeddings-inference, TEI (`text-embeddings-router --model-id MODEL`), `POST /predict`: rows of one text or a pair,
`raw_scores: true`; back come each row's labels, the highest first.

Who does not answer, or with something else, gets one `UserError`: the URL, what was found, what was expected. Lost connections, timeouts,
429 and 5xx are tried again for about three minutes, waiting twice as long each time or as `Retry-After` says; what is too large is halved.
A server that wants a key gets REWARD_API_KEY of the environment as a bearer token. Proxies of the environment are not used.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import urllib3

from pipeline.errors import UserError

RETRIES = urllib3.Retry(
    8,
    backoff_factor=1,
    backoff_max=60,
    retry_after_max=300,
    status_forcelist=[429, *range(500, 600)],
    allowed_methods=None,
    raise_on_status=False,
)

FAIL_FAST = RETRIES.new(total=1)  # where someone waits to be told

TOO_LARGE = (413, 422)  # TEI's versions differ

START_COMMANDS = (
    "start one with: vllm serve MODEL --runner pooling; or text-embeddings-router --model-id MODEL"
)

POOL = urllib3.PoolManager()


class Server(NamedTuple):
    """What a server says of itself. It takes `rows` in a request and `tokens` in a row, where it tells (0: it does not)."""

    url: str
    engine: str
    model: str
    path: str
    revision: str | None = None
    tokens: int = 0
    rows: int = 0


def probe(url: str, timeout: float) -> Server:
    """Who answers at `url`. Raises `UserError` where it is neither engine."""
    seen = []
    for path, parse in (("/info", _parse_tei_info), ("/v1/models", _parse_vllm_models)):
        answer = _request(url + path, timeout, FAIL_FAST)
        with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
            return parse(url, answer.json())
        seen.append(f"{path} {_preview(answer)}")
    raise UserError(f"{url}: neither text-embeddings-inference nor vLLM: {', '.join(seen)}; {START_COMMANDS}")


def _parse_tei_info(url: str, info: Any) -> Server:
    if not {"classifier", "reranker"} & set(info["model_type"]):
        raise UserError(
            f"{url}: {info['model_id']} is of type {', '.join(info['model_type'])}; expected a sequence classifier"
        )
    name = info["model_id"]
    return Server(
        url,
        "tei",
        name,
        name,
        info.get("model_sha"),
        int(info["max_input_length"]),
        int(info["max_client_batch_size"]),
    )


def _parse_vllm_models(url: str, found: Any) -> Server:
    first = found["data"][0]
    return Server(
        url,
        "vllm",
        first["id"],
        first.get("root") or first["id"],
        tokens=int(first.get("max_model_len") or 0),
    )


def request_logits(
    server: Server,
    rows: Sequence[Any],
    labels: Sequence[str],
    timeout: float,
    retries: urllib3.Retry = RETRIES,
) -> list[list[float]]:
    """Of each row (ids for vLLM, one or two texts for TEI) a logit for each label. Raises `UserError`."""
    path, body, parse = FORMATS[server.engine]
    answer = _request(server.url + path, timeout, retries, body(server, rows))
    if answer.status in TOO_LARGE and len(rows) > 1:
        half = len(rows) // 2
        return [
            row
            for part in (rows[:half], rows[half:])
            for row in request_logits(server, part, labels, timeout, retries)
        ]
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # what has another shape
        found = (
            [[float(value) for value in row] for row in parse(answer.json(), labels)]
            if answer.status == 200
            else []
        )
        if [len(row) for row in found] == [len(labels)] * len(rows) and all(
            math.isfinite(value) for row in found for value in row
        ):
            return found
    expected = f"{len(rows)} × {len(labels)} finite logits ({', '.join(labels)})"
    raise UserError(f"{server.url}{path}: {_preview(answer)}; expected {expected}; {START_COMMANDS}")


def _request(url: str, timeout: float, retries: urllib3.Retry, body: Any = None) -> urllib3.BaseHTTPResponse:
    """The last answer, whatever its status. Raises `UserError` where there is none, or a key is missing."""
    key = os.environ.get("REWARD_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else None
    try:
        options: dict[str, Any] = {
            "headers": headers,
            "timeout": timeout,
            "retries": retries,
            "redirect": False,
        }
        answer = POOL.request("GET" if body is None else "POST", url, json=body, **options)
    except urllib3.exceptions.HTTPError as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url}: no answer: {reason}; {START_COMMANDS}, or raise 'timeout' (of {timeout:g} s)"
        ) from None
    if answer.status in (401, 403):
        raise UserError(
            f"{url}: {_preview(answer)}; expected to be let in; put its key into the environment as REWARD_API_KEY"
        )
    return answer


def _preview(answer: urllib3.BaseHTTPResponse) -> str:
    text = " ".join(answer.data.decode(errors="replace").split())
    return f"answered {answer.status}, {text[:200]!r}"


FORMATS: dict[
    str, tuple[str, Callable[..., Any], Callable[..., Any]]
] = {  # path, body of a request, logits of an answer
    "vllm": (
        "/classify",
        lambda server, rows: {"model": server.model, "input": rows, "use_activation": False},
        lambda found, _: [each["probs"] for each in sorted(found["data"], key=lambda each: each["index"])],
    ),
    "tei": (
        "/predict",
        lambda _, rows: {"inputs": rows, "raw_scores": True, "truncate": True},
        lambda found, labels: [
            [{each["label"]: each["score"] for each in row}[label] for label in labels] for row in found
        ],
    ),
}
