"""Clients of inference servers: which engine serves a URL, and the logits of rows in its wire format.

- vLLM (`vllm serve MODEL --runner pooling`): `POST /classify` with rows of token ids and `use_activation:
  false`, which every version that accepts ids supports. A token classifier is asked by `POST /pooling` for
  `task: token_classify`, and answers with the logits of each token.
- Text-embeddings-inference, TEI (`text-embeddings-router --model-id MODEL`): `POST /predict` with rows of one
  text or a pair and `raw_scores: true`. The response has each row's labels, the highest score first.

Errors: a server that does not respond, or sends something else, raises one `UserError` with the URL, what was
found and what was expected. A request that is too large is halved. What bounds a reply, and who gets the key,
is in `pipeline.engines.requests`.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from pipeline.engines.requests import FAIL_FAST, TRIES, send_request
from pipeline.errors import UserError

TOO_LARGE = (413, 422)  # TEI's versions differ
MAX_INFO = 1_000_000  # bytes of what a server reports of itself
MAX_NAME = 1_000  # characters of a model's name
START_COMMANDS = (
    "start one with: vllm serve MODEL --runner pooling; or text-embeddings-router --model-id MODEL"
)
LARGEST = torch.finfo(torch.float32).max
WRONG_SHAPE = (ValueError, TypeError, KeyError, IndexError, AttributeError)  # of a parser, for another JSON


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
        reply = send_request(url + path, timeout, MAX_INFO, tries=FAIL_FAST, hint=START_COMMANDS)
        with suppress(*WRONG_SHAPE):
            return parse(url, reply.json())
        previews.append(f"{path} {reply.preview()}")
    raise UserError(
        f"{url}: neither text-embeddings-inference nor vLLM: {', '.join(previews)}; {START_COMMANDS}"
    )


def _parse_tei_info(url: str, info: Any) -> Server:
    name, types = _as_name(info["model_id"]), set(map(_as_name, info["model_type"]))
    if not {"classifier", "reranker"} & types:
        raise UserError(
            f"{url}: {name} is of type {', '.join(sorted(types))}; expected a sequence classifier"
        )
    revision = info.get("model_sha")
    return Server(
        url,
        engine="tei",
        model=name,
        path=name,
        revision=None if revision is None else _as_name(revision),
        tokens=_as_count(info["max_input_length"]),
        rows=_as_count(info["max_client_batch_size"]),
    )


def _parse_vllm_models(url: str, models: Any) -> Server:
    first = models["data"][0]
    return Server(
        url,
        engine="vllm",
        model=_as_name(first["id"]),
        path=_as_name(first.get("root") or first["id"]),
        tokens=_as_count(first.get("max_model_len") or 0),
    )


def _as_name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise ValueError("is no name")
    return value


def _as_count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("is no count")
    return value


def request_logits(
    server: Server,
    rows: Sequence[Any],
    labels: Sequence[str],
    timeout: float,
    tries: int = TRIES,
    *,
    per_token: bool = False,
) -> list[list[float]]:
    """Return a logit for each label of each row, or of each token of the rows, one after the other.

    Rows are token ids for vLLM, one or two texts for TEI, which has no `per_token`. Raises `UserError` if the
    server does not send one finite logit for each.
    """
    path, build_body, parse = FORMATS[f"{server.engine} tokens" if per_token else server.engine]
    counts = [len(row) if per_token else 1 for row in rows]
    max_bytes = MAX_INFO + sum(counts) * sum(200 + 6 * len(label) for label in labels)
    body = build_body(server, rows)
    reply = send_request(server.url + path, timeout, max_bytes, body, tries, hint=START_COMMANDS)
    if reply.status in TOO_LARGE and len(rows) > 1:
        half = len(rows) // 2
        return [
            row
            for part in (rows[:half], rows[half:])
            for row in request_logits(server, part, labels, timeout, tries, per_token=per_token)
        ]

    with suppress(*WRONG_SHAPE):
        outputs = parse(reply.json(), labels) if reply.status == 200 else []
        logits = [values for row in outputs for values in row]
        if [len(row) for row in outputs] == counts and all(len(row) == len(labels) for row in logits):
            return [[_as_logit(value) for value in row] for row in logits]
    expected = f"{sum(counts)} × {len(labels)} finite logits ({', '.join(labels)})"
    raise UserError(f"{server.url}{path}: {reply.preview()}; expected {expected}; {START_COMMANDS}")


def _as_logit(value: Any) -> float:
    if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
        raise ValueError("is no finite number")
    return float(value)


def _parse_vllm_logits(response: Any, _: Sequence[str]) -> list[list[Any]]:
    """Return the logits of each row, in a list of one. See `_order_rows` for errors."""
    return [[row] for row in _order_rows(response, "probs")]


def _parse_vllm_tokens(response: Any, _: Sequence[str]) -> list[list[Any]]:
    """Return the logits of each token of each row. See `_order_rows` for errors."""
    rows = _order_rows(response, "data")
    if not all(isinstance(token, list) for row in rows for token in row):
        raise ValueError("has a token whose logits are no list")
    return rows


def _order_rows(response: Any, field: str) -> list[list[Any]]:
    """Return the lists in a field of vLLM's rows. Raises an error if an index is missing or given twice."""
    rows = {_as_count(row["index"]): row[field] for row in response["data"]}
    if len(rows) != len(response["data"]) or not all(isinstance(row, list) for row in rows.values()):
        raise ValueError("has an index twice, or a row that is no list")
    return [rows[index] for index in range(len(rows))]


def _parse_tei_logits(response: Any, labels: Sequence[str]) -> list[list[Any]]:
    """Return the logits of each row, in a list of one. Raises an error if a row has a label twice."""
    scores = [{entry["label"]: entry["score"] for entry in row} for row in response]
    if list(map(len, scores)) != list(map(len, response)):
        raise ValueError("has a label twice")
    return [[[row[label] for label in labels]] for row in scores if len(row) == len(labels)]


# By engine, and for the outputs of tokens: the path, the body of a request, and the logits of a response.
FORMATS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "vllm": (
        "/classify",
        lambda server, rows: {"model": server.model, "input": rows, "use_activation": False},
        _parse_vllm_logits,
    ),
    "vllm tokens": (
        "/pooling",
        lambda server, rows: {
            "model": server.model,
            "input": rows,
            "task": "token_classify",
            "use_activation": False,
        },
        _parse_vllm_tokens,
    ),
    "tei": (
        "/predict",
        lambda _, rows: {"inputs": rows, "raw_scores": True, "truncate": True},
        _parse_tei_logits,
    ),
}
