"""Requests to a server that is not trusted: a reply is bounded in time, in bytes and in depth.

- `timeout` is a deadline: it includes the name lookup, a slow trickle of bytes, and the tries after lost
  connections, 429 and 5xx.
- A reply may have so many bytes, uncompressed; its JSON is parsed strictly.
- Redirects are not followed. The environment's proxies are not used.
- REWARD_API_KEY is sent as a bearer token to the server that REWARD_API_URL names, and to no other;
  POLICY_API_KEY to the servers in POLICY_API_URL, a list with commas. No error and no log contains a key.
"""

import ipaddress
import json
import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pipeline.errors import UserError, one_line

logger = logging.getLogger(__name__)

TRIES = 9
FAIL_FAST = 2  # tries of a check before a run, while the user waits
MAX_WAIT = 60  # seconds between two tries, if the server names no other number
KEYS = ("REWARD", "POLICY")  # what the names of the variables with a key and its servers begin with
TO_RETRY = {429, *range(500, 600)}
REDIRECTS = range(300, 400)
PIECE = 1 << 16  # bytes

# A connection per server that waits for its next request. It is taken out while it is used.
IDLE: dict[tuple[str, str], HTTPConnection] = {}


class NoReply(Exception):
    """There is no whole reply: the connection was lost, time is up, or it is too large."""


class Reply(NamedTuple):
    """A reply of a server: its status, its bytes, and two of its headers."""

    status: int
    data: bytes
    location: str = ""
    retry_after: str = ""

    def preview(self) -> str:
        """Return the status and the beginning of the text on one line, without the key."""
        text = " ".join(self.data[:1000].decode(errors="replace").split())
        return f"returned {self.status}, {_without_key(text)[:200]!r}"

    def json(self) -> Any:
        """Parse the text as JSON. Raises `ValueError` if it is none, if it has NaN, or is nested too deep."""
        try:
            return json.loads(self.data, parse_constant=_refuse_constant)
        except RecursionError:
            raise ValueError("is nested too deep") from None


def send_request(
    url: str,
    timeout: float,
    max_bytes: int,
    body: Any = None,
    tries: int = TRIES,
    *,
    hint: str,
    key: str = "REWARD",
) -> Reply:
    """Return the last reply, whatever its status; `timeout` is in seconds. A `body` is posted as JSON.

    Raises `UserError` if there is no whole reply in time, if it is a redirect, or if the server requires a
    key. `hint` tells the user how to start such a server, and `key` is which of `KEYS` is for it.
    """
    reply = _try_until(time.monotonic() + timeout, url, max_bytes, body, tries)
    if not isinstance(reply, Reply):
        raise UserError(f"{url}: no response: {reply}; {hint}, or raise 'timeout' (now {timeout:g} s)")
    if reply.status in REDIRECTS:
        raise UserError(
            f"{url}: redirects to {_without_key(reply.location)!r}, which is not followed; "
            "set the URL of the server itself"
        )
    if reply.status in (401, 403):
        raise UserError(
            f"{url}: {reply.preview()}; expected access; put its key into the environment as {key}_API_KEY, "
            f"and as {key}_API_URL the server that gets it: {_origin(url)}"
        )
    return reply


def _try_until(deadline: float, url: str, max_bytes: int, body: Any, tries: int) -> Reply | str:
    """Return the last of so many tries before the deadline, or why it got no whole reply."""
    outcome: Reply | str = ""
    for number in range(tries):
        try:
            outcome = _send_once(url, deadline - time.monotonic(), max_bytes, body)
        except NoReply as error:
            outcome = _without_key(one_line(error))
        reply = outcome if isinstance(outcome, Reply) else None
        if reply is not None and reply.status not in TO_RETRY:
            break
        wait = _seconds_to_wait(number, reply)
        if number + 1 == tries or time.monotonic() + wait >= deadline:
            break
        if wait:
            time.sleep(wait)
    return outcome


def _seconds_to_wait(number: int, reply: Reply | None) -> float:
    """Return the time before the next try: what the server asks for, or twice as much each time."""
    if reply is not None and reply.retry_after.isdecimal() and len(reply.retry_after) < 9:
        return int(reply.retry_after)
    return min(2**number, MAX_WAIT) if number else 0


def _send_once(url: str, seconds: float, max_bytes: int, body: Any) -> Reply:
    """Send a request in a thread of its own, since no socket has a limit on the whole of a reply.

    Raises `NoReply`. After `seconds` the connection is shut, which ends the thread.
    """
    outcome: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()
    server = (urlsplit(url).scheme, urlsplit(url).netloc)
    headers = {"Accept": "application/json"} | _authorization(url)
    try:
        connection = _idle_connection(server, seconds) or _new_connection(server, seconds)
    except HTTPException as error:  # the port is no number
        raise NoReply(one_line(error)) from error
    data = None if body is None else json.dumps(body).encode()
    if data is not None:
        headers["Content-Type"] = "application/json"

    def work() -> None:
        try:
            outcome.put(_exchange(connection, url, data, headers, max_bytes))
        except Exception as error:  # it is raised below
            outcome.put(error)

    threading.Thread(target=work, daemon=True, name="request to a server").start()
    try:
        result = outcome.get(timeout=max(seconds, 0))
    except queue.Empty:
        result = NoReply("timed out")
    if isinstance(result, Reply):
        IDLE[server] = connection
        return result
    _shut(connection)
    # A host or port that cannot be is a ValueError or an OverflowError.
    if isinstance(result, NoReply | OSError | HTTPException | ValueError | OverflowError):
        raise NoReply(one_line(result)) from result
    raise result


def _exchange(
    connection: HTTPConnection, url: str, data: bytes | None, headers: dict[str, str], max_bytes: int
) -> Reply:
    parts = urlsplit(url)
    connection.request("GET" if data is None else "POST", parts.path or "/", data, headers)
    response = connection.getresponse()
    if (coding := response.getheader("Content-Encoding", "identity")) != "identity":
        raise NoReply(f"is compressed by {coding[:40]!r}, which was not asked for")
    is_chunked = response.getheader("Transfer-Encoding", "").lower() == "chunked"
    # `read` would read a chunk of negative size to the end, `read1` has no count of what is left.
    read, content = response.read1 if is_chunked else response.read, bytearray()
    while piece := read(PIECE):
        content += piece
        if len(content) > max_bytes:
            raise NoReply(f"is over {max_bytes:,} bytes")
    if response.length:  # of what the header announced
        raise NoReply(f"ended {response.length:,} bytes early")
    location, retry_after = (response.getheader(name, "") for name in ("Location", "Retry-After"))
    return Reply(response.status, bytes(content), location[:200], retry_after)


def _new_connection(server: tuple[str, str], seconds: float) -> HTTPConnection:
    scheme, netloc = server
    build: Callable[..., HTTPConnection] = HTTPSConnection if scheme == "https" else HTTPConnection
    return build(netloc, timeout=max(seconds, 0.001))


def _idle_connection(server: tuple[str, str], seconds: float) -> HTTPConnection | None:
    """Return the open connection to a server; None if there is none, or the server has closed it."""
    connection = IDLE.pop(server, None)
    if connection is None or connection.sock is None:
        return None
    if select.select([connection.sock], [], [], 0)[0]:  # nothing is expected: it was closed
        _shut(connection)
        return None
    connection.sock.settimeout(max(seconds, 0.001))
    return connection


def _shut(connection: HTTPConnection) -> None:
    """Close a connection, also under a thread that waits for it."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(SHUT_RDWR)
    connection.close()


def _authorization(url: str) -> dict[str, str]:
    """Return the header with a key, if this server is one that it is for. Raises `UserError`."""
    for name in KEYS:
        key, owners = (os.environ.get(f"{name}_API_{part}", "").strip() for part in ("KEY", "URL"))
        if not key or _origin(url) not in [_origin(owner.strip()) for owner in owners.split(",") if owner]:
            continue
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{name}_API_KEY: contains characters that no key has; set it again")
        if urlsplit(url).scheme == "http" and not _is_local(urlsplit(url).hostname or ""):
            _warn_of_clear_text(_origin(url), name)
        return {"Authorization": f"Bearer {key}"}
    return {}


def _origin(url: str) -> str:
    """Return scheme://host:port of a URL; of no URL, the text itself."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return url
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


WARNED: set[str] = set()


def _warn_of_clear_text(origin: str, name: str) -> None:
    if origin not in WARNED:
        WARNED.add(origin)
        logger.warning("%s: %s_API_KEY goes there unencrypted; use https", origin, name)


def _without_key(text: str) -> str:
    for name in KEYS:
        if key := os.environ.get(f"{name}_API_KEY", "").strip():
            text = text.replace(key, "***")
    return text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
