"""A server that misbehaves costs no more than `timeout` and `max_bytes`; the key goes to its owner alone."""

import gzip
import json
import re
import socket
import threading
import time
from contextlib import suppress
from functools import partial

import pytest

from pipeline.engines import requests
from pipeline.errors import UserError

HEAD = b"HTTP/1.1 200 OK\r\n"
KEY = "s3cret-key"

send_request = partial(requests.send_request, hint="start one with: serve")


class Script(threading.Thread):
    """A server that reads a request and sends one of `replies` to each connection, piece by piece.

    A piece that is a number is a time to wait; None waits until the client has gone.
    """

    def __init__(self, *replies):
        super().__init__(daemon=True)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.replies, self.requests, self.gone = list(replies), [], threading.Event()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def run(self):
        for reply in self.replies:
            with suppress(OSError):
                connection, _ = self.socket.accept()
                with connection:
                    self.requests.append(read_request(connection))
                    for piece in reply:
                        if piece is None:
                            connection.recv(1)
                        elif isinstance(piece, float):
                            self.gone.wait(piece)
                        else:
                            connection.sendall(piece)
            self.gone.set()


def read_request(connection):
    head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += connection.recv(1 << 16)
    return head + b"\r\n\r\n" + body


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No waits between tries, no open connections, no key."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(requests, "IDLE", {})
    monkeypatch.setattr(requests, "WARNED", set())
    for name in ("REWARD_API_KEY", "REWARD_API_URL", "POLICY_API_KEY", "POLICY_API_URL"):
        monkeypatch.delenv(name, raising=False)


def endless(piece, pause=None):
    while True:
        yield piece
        if pause:
            yield pause


def sized(body, *headers):
    lines = b"".join(header + b"\r\n" for header in headers)
    return [HEAD + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body]


def chained(first, rest):
    yield first
    yield from rest


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
TOO_LARGE = "no response: is over 5,000 bytes; start one with"
LATE = "no response: timed out; start one with"
BROKEN = "no response: .*; start one with"
MISBEHAVIOURS = {
    "an endless body": (lambda: chained(HEAD + b"\r\n", endless(b"x" * 4096)), TOO_LARGE),
    "a length of a terabyte": (
        lambda: chained(HEAD + b"Content-Length: 1000000000000\r\n\r\n", endless(b"x" * 4096)),
        TOO_LARGE,
    ),
    "endless chunks": (lambda: chained(CHUNKED, endless(b"1000\r\n" + b"x" * 4096 + b"\r\n")), TOO_LARGE),
    "a chunk of a terabyte": (
        lambda: chained(CHUNKED + b"fffffffffff\r\n", endless(b"x" * 4096)),
        TOO_LARGE,
    ),
    "a chunk of a negative size": (lambda: chained(CHUNKED + b"-5\r\n", endless(b"x" * 4096)), TOO_LARGE),
    "a chunk size without end": (lambda: chained(CHUNKED, endless(b"0" * 4096)), BROKEN),
    "garbage for chunks": (lambda: [CHUNKED + b"zz\r\nhello"], BROKEN),
    "half a chunk": (lambda: [CHUNKED + b"5\r\nhel"], BROKEN),
    "half a body": (lambda: [HEAD + b"Content-Length: 10\r\n\r\nhello"], "no response: ended 5 bytes early"),
    "gzip that was not asked for": (
        lambda: sized(gzip.compress(b"0" * 10**7), b"Content-Encoding: gzip"),
        "no response: is compressed by 'gzip', which was not asked for",
    ),
    "a trickle of the body": (
        lambda: chained(HEAD + b"Content-Length: 1000\r\n\r\n", endless(b"x", 0.01)),
        LATE,
    ),
    "a trickle of chunks": (lambda: chained(CHUNKED, endless(b"1\r\nx\r\n", 0.01)), LATE),
    "a trickle of headers": (lambda: chained(HEAD, endless(b"X", 0.01)), LATE),
    "silence": (lambda: [None], LATE),
    "a status line of no protocol": (lambda: [b"SSH-2.0-OpenSSH_9.6\r\n"], BROKEN),
    "a header line without end": (lambda: chained(HEAD + b"X: ", endless(b"y" * 4096)), BROKEN),
    "headers without end": (lambda: chained(HEAD, endless(b"X: y\r\n" * 500)), BROKEN),
    "continue, and continue": (lambda: endless(b"HTTP/1.1 100 Continue\r\n\r\n"), LATE),
    "an empty reply": (lambda: [b""], BROKEN),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_misbehaving_server_is_one_line(name):
    reply, message = MISBEHAVIOURS[name]
    server = Script(reply())
    with pytest.raises(UserError, match=rf"^{server.url}/x: {message}") as error:
        send_request(server.url + "/x", 0.3, 5000, tries=1)
    assert "\n" not in str(error.value)
    assert server.gone.wait(10)  # the connection was shut, so that the server could go on


def test_a_deep_reply_and_a_constant_are_no_json():
    for body, reason in (
        (b"[" * 4000, "nested too deep"),
        (b'{"a": NaN}', "NaN"),
        (b"-Infinity", "-Infinity"),
    ):
        reply = send_request(Script(sized(body)).url, 5, 5000)
        with pytest.raises(ValueError, match=reason):
            reply.json()


def test_the_deadline_counts_all_tries():
    """The first try is lost at once; the second hangs, and has what the first left of the time."""
    server = Script([b""], [None])
    with pytest.raises(UserError, match="no response: timed out"):
        send_request(server.url, 0.3, 5000, tries=9)
    assert len(server.requests) == 2


def test_a_connection_is_kept_and_a_closed_one_is_replaced():
    server = Script(sized(b"1"), sized(b"2"))  # it closes after each reply
    assert [send_request(server.url, 5, 5000, tries=1).json() for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("url", ["http://h:99999", "http://h:port", f"http://{'h' * 70}", "http://h/ \n"])
def test_a_place_that_cannot_be_is_one_line(url):
    with pytest.raises(UserError, match="no response: ") as error:
        send_request(url, 1, 5000, tries=1)
    assert "\n" not in str(error.value).replace(url, "")


def test_a_redirect_is_told_and_not_followed(monkeypatch):
    other = Script(sized(b"{}"))
    monkeypatch.setenv("REWARD_API_KEY", KEY)
    for location in (other.url, "/again", f"{other.url}/?key={KEY}", "\x1b[31m"):
        lines = f"HTTP/1.1 307 Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
        server = Script([lines.encode()])
        with pytest.raises(
            UserError, match=r"redirects to '.*', which is not followed; set the URL"
        ) as error:
            send_request(server.url, 5, 5000)
        assert KEY not in str(error.value)
        assert "\x1b" not in str(error.value)
    assert other.requests == []


def test_the_key_goes_to_the_named_server_alone(monkeypatch):
    monkeypatch.setenv("REWARD_API_KEY", f" {KEY}\n")
    cases = {
        "": False,
        "http://127.0.0.1:{port}": True,
        "http://127.0.0.1:{port}/v1/": True,
        "HTTP://127.0.0.1:{port}": True,
        "https://127.0.0.1:{port}": False,
        "http://127.0.0.1:1{port}": False,
        "http://127.0.0.1": False,
        "http://localhost:{port}": False,
        "http://127.0.0.1.evil.example:{port}": False,
        "http://evil.example/@127.0.0.1:{port}": False,
        "127.0.0.1:{port}": False,
        "http://[": False,
        "*": False,
    }
    for owner, is_sent in cases.items():
        server = Script(sized(b"{}"))
        monkeypatch.setenv("REWARD_API_URL", owner.format(port=server.port))
        send_request(server.url, 5, 5000)
        assert (f"Authorization: Bearer {KEY}\r\n".encode() in server.requests[0]) == is_sent, owner


def test_a_key_for_several_servers_goes_to_each_of_them_and_the_other_key_to_none(monkeypatch):
    monkeypatch.setenv("POLICY_API_KEY", KEY)
    monkeypatch.setenv("REWARD_API_KEY", "another")
    monkeypatch.setenv("POLICY_API_URL", "http://127.0.0.1:1/v1, http://127.0.0.1:2")
    monkeypatch.setenv("REWARD_API_URL", "http://127.0.0.1:4")
    sent = [requests._authorization(f"http://127.0.0.1:{port}/v1/completions") for port in (1, 2, 3, 4)]
    keys = [header.get("Authorization", "").removeprefix("Bearer ") for header in sent]
    assert keys == [KEY, KEY, "", "another"]
    denied = b"HTTP/1.1 401 No\r\nContent-Length: 20\r\n\r\nno key " + KEY.encode() + b"..."
    with pytest.raises(UserError, match=r"'no key \*\*\*...'; .* as POLICY_API_KEY, and as POLICY_API_URL "):
        send_request(Script([denied]).url, 5, 5000, key="POLICY")


def test_the_key_is_in_no_error(monkeypatch, caplog):
    monkeypatch.setenv("REWARD_API_KEY", KEY)
    denied = b"HTTP/1.1 401 No\r\nContent-Length: 20\r\n\r\nno key " + KEY.encode() + b"..."
    server = Script([denied], [KEY.encode() + b"\r\n\r\n"])
    monkeypatch.setenv("REWARD_API_URL", server.url)
    with pytest.raises(
        UserError, match=r"returned 401, 'no key \*\*\*...'; expected access; put its key"
    ) as error:
        send_request(server.url, 5, 5000)
    with pytest.raises(UserError, match="no response: ") as another:
        send_request(server.url, 5, 5000, tries=1)
    for text in (str(error.value), str(another.value), caplog.text):
        assert KEY not in text
    for key in ("two\nlines", "caf\u00e9", "\x00x"):
        monkeypatch.setenv("REWARD_API_KEY", key.replace("\x00", "\x01"))
        with pytest.raises(UserError, match=r"^REWARD_API_KEY: contains characters that no key has"):
            send_request(server.url, 5, 5000)


def test_a_key_that_would_go_in_clear_text_is_told(monkeypatch, caplog):
    monkeypatch.setenv("REWARD_API_KEY", KEY)
    for url in (
        "http://gpu7:8000",
        "http://127.0.0.1:8000",
        "http://[::1]:8000",
        "http://localhost",
        "https://h",
    ):
        monkeypatch.setenv("REWARD_API_URL", url)
        for _ in range(2):
            assert requests._authorization(f"{url}/classify") == {"Authorization": f"Bearer {KEY}"}
    assert caplog.messages == ["http://gpu7:8000: REWARD_API_KEY goes there unencrypted; use https"]


def test_a_body_is_posted_as_json():
    server = Script(sized(b"[]"))
    assert send_request(f"{server.url}/classify", 5, 5000, {"input": [[1, 2]]}).json() == []
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /classify HTTP/1.1\r\n")
    assert b"Content-Type: application/json" in head
    assert json.loads(body) == {"input": [[1, 2]]}
