"""Clients of inference servers: which engine serves a URL, and the logits of rows in its wire format.

- vLLM (`vllm serve MODEL --runner pooling`): `POST /classify` with rows of token ids and `use_activation:
  false`, which every version that accepts ids supports.
- Text-embeddings-inference, TEI (`text-embeddings-router --model-id MODEL`): `POST /predict` with rows of one
  text or a pair and `raw_scores: true`. The response has each row's labels, the highest score first.

Errors: a server that does not respond, or sends something else, raises one `UserError` with the URL, what was
found and what was expected. Lost connections, timeouts, 429 and 5xx are retried for about three minutes. The
wait doubles each time, or follows `Retry-After`. A request that is too large is halved.

A server that requires a key gets REWARD_API_KEY of the environment as a bearer token. The environment's
proxies are not used.
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
FAIL_FAST = RETRIES.new(total=1)  # for checks before a run, while the user waits

TOO_LARGE = (413, 422)  # TEI's versions differ

START_COMMANDS = (
    "start one with: vllm serve MODEL --runner pooling; or text-embeddings-router --model-id MODEL"
)

POOL = urllib3.PoolManager()


class Server(NamedTuple):
    """What a server reports of itself.

    It accepts `rows` in a request and `tokens` in a row; 0 if it does not report the number.
    """

    url: str
    engine: str
    model: str
    path: str
    revision: str | None = None
    tokens: int = 0
    rows: int = 0


def probe(url: str, timeout: float) -> Server:
    """Return the server at `url`; `timeout` is in seconds.

    Raises `UserError` if it is neither engine, or serves no sequence classifier.
    """
    previews = []
    for path, parse in (("/info", _parse_tei_info), ("/v1/models", _parse_vllm_models)):
        response = _request(url + path, timeout, FAIL_FAST)
        with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
            return parse(url, response.json())
        previews.append(f"{path} {_preview(response)}")
    raise UserError(
        f"{url}: neither text-embeddings-inference nor vLLM: {', '.join(previews)}; {START_COMMANDS}"
    )


def _parse_tei_info(url: str, info: Any) -> Server:
    if not {"classifier", "reranker"} & set(info["model_type"]):
        raise UserError(
            f"{url}: {info['model_id']} is of type {', '.join(info['model_type'])}; "
            "expected a sequence classifier"
        )
    name = info["model_id"]
    return Server(
        url,
        engine="tei",
        model=name,
        path=name,
        revision=info.get("model_sha"),
        tokens=int(info["max_input_length"]),
        rows=int(info["max_client_batch_size"]),
    )


def _parse_vllm_models(url: str, models: Any) -> Server:
    first = models["data"][0]
    return Server(
        url,
        engine="vllm",
        model=first["id"],
        path=first.get("root") or first["id"],
        tokens=int(first.get("max_model_len") or 0),
    )


def request_logits(
    server: Server,
    rows: Sequence[Any],
    labels: Sequence[str],
    timeout: float,
    retries: urllib3.Retry = RETRIES,
) -> list[list[float]]:
    """Return a logit for each label of each row.

    Rows are token ids for vLLM, one or two texts for TEI. Raises `UserError` if the server does not send
    finite logits.
    """
    path, build_body, parse = FORMATS[server.engine]
    response = _request(server.url + path, timeout, retries, build_body(server, rows))
    if response.status in TOO_LARGE and len(rows) > 1:
        half = len(rows) // 2
        return [
            row
            for part in (rows[:half], rows[half:])
            for row in request_logits(server, part, labels, timeout, retries)
        ]

    with suppress(ValueError, TypeError, KeyError, AttributeError):  # a response of another shape
        logits = []
        if response.status == 200:
            logits = [[float(value) for value in row] for row in parse(response.json(), labels)]
        has_shape = [len(row) for row in logits] == [len(labels)] * len(rows)
        if has_shape and all(math.isfinite(value) for row in logits for value in row):
            return logits
    expected = f"{len(rows)} × {len(labels)} finite logits ({', '.join(labels)})"
    raise UserError(f"{server.url}{path}: {_preview(response)}; expected {expected}; {START_COMMANDS}")


def _request(url: str, timeout: float, retries: urllib3.Retry, body: Any = None) -> urllib3.BaseHTTPResponse:
    """Return the last response, whatever its status.

    Raises `UserError` if there is none, or if the server requires a key.
    """
    key = os.environ.get("REWARD_API_KEY")
    options: dict[str, Any] = {
        "headers": {"Authorization": f"Bearer {key}"} if key else None,
        "timeout": timeout,
        "retries": retries,
        "redirect": False,
    }
    try:
        response = POOL.request("GET" if body is None else "POST", url, json=body, **options)
    except urllib3.exceptions.HTTPError as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{url}: no response: {reason}; {START_COMMANDS}, or raise 'timeout' (now {timeout:g} s)"
        ) from None
    if response.status in (401, 403):
        raise UserError(
            f"{url}: {_preview(response)}; expected access; "
            "put its key into the environment as REWARD_API_KEY"
        )
    return response


def _preview(response: urllib3.BaseHTTPResponse) -> str:
    text = " ".join(response.data.decode(errors="replace").split())
    return f"returned {response.status}, {text[:200]!r}"


def _parse_vllm_logits(response: Any, _: Sequence[str]) -> list[list[Any]]:
    return [row["probs"] for row in sorted(response["data"], key=lambda row: row["index"])]


def _parse_tei_logits(response: Any, labels: Sequence[str]) -> list[list[Any]]:
    scores = [{entry["label"]: entry["score"] for entry in row} for row in response]
    return [[row[label] for label in labels] for row in scores]


# By engine: the path, the body of a request, and the logits of a response.
FORMATS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "vllm": (
        "/classify",
        lambda server, rows: {"model": server.model, "input": rows, "use_activation": False},
        _parse_vllm_logits,
    ),
    "tei": (
        "/predict",
        lambda _, rows: {"inputs": rows, "raw_scores": True, "truncate": True},
        _parse_tei_logits,
    ),
}
