"""Clients that keep a connection and the server waiting."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kangaroo_jax.serving.limits import Limits
from tests.serving.test_app import HELLO, NOTHING, ask, send, soon

openai = pytest.importorskip("openai")
HEAD = b"GET /ping HTTP/1.1\r\nHost: x\r\n"


def opened(server: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


@contextlib.contextmanager
def ended_within(seconds: float) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    assert time.perf_counter() - begun < seconds


def received(raw: socket.socket) -> bytes:
    """What comes until the connection ends."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while more := raw.recv(1 << 16):
            found += more
    return found


def trickled(raw: socket.socket, piece: bytes) -> None:
    """The same again and again, until the server has had enough."""
    end = time.monotonic() + 20
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            raw.sendall(piece)
            time.sleep(0.02)
        pytest.fail("the server goes on reading")


def test_the_head_of_a_request_must_come_in_time(start) -> None:
    server = start(seconds=0.4)
    with opened(server) as silent, ended_within(15):
        assert received(silent) == b""
    with opened(server) as slow, ended_within(15):
        slow.sendall(HEAD)
        trickled(slow, b"X-a: b\r\n")


def test_the_head_of_the_next_request_must_come_in_time_too(start) -> None:
    server = start(seconds=0.4)
    with opened(server) as raw, ended_within(15):
        raw.sendall(HEAD + b"\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        raw.sendall(HEAD + b"\r\n" + HEAD)  # one and a half
        assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        trickled(raw, b"X-a: b\r\n")


def test_a_body_that_was_refused_is_not_read_for_ever(start) -> None:
    server = start(Limits(max_body_mb=1), seconds=0.4)
    with opened(server) as raw, ended_within(15):
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        trickled(raw, b"8000\r\n" + bytes(0x8000) + b"\r\n")
    soon(server.left, NOTHING)


def test_an_answer_that_takes_longer_is_not_broken_off(start) -> None:
    server = start(seconds=0.3)
    server.engine.pause = 0.3
    assert ask(server.client()).choices[0].message.content == "Hello 世界"
    assert "".join(piece.choices[0].delta.content or "" for piece in ask(server.client(), stream=True)) == "Hello 世界"


def test_of_too_many_connections_the_one_goes_that_waits_longest(start) -> None:
    server = start(most=4)
    server.engine.go.clear()
    body = json.dumps({"messages": HELLO}).encode()
    with opened(server) as busy, contextlib.ExitStack() as stack:
        busy.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        soon(lambda: len(server.engine.tickets), 1)
        idle = [stack.enter_context(opened(server)) for _ in range(6)]
        assert [received(raw) for raw in idle[:3]] == [b""] * 3
        assert send(server.port, "GET", "/health")[0] == 200
        server.engine.go.set()
        assert b"200 OK" in busy.recv(1000)


@pytest.mark.parametrize("bounds", [{"seconds": 0.5}, {"limits": Limits(max_request_seconds=0.5), "seconds": 1.0}])
def test_an_answer_that_nobody_reads_is_given_up(start, bounds: dict[str, Any]) -> None:
    server = start(**bounds)
    server.engine.pieces = ("word " * 2000,) * 2000
    body = json.dumps({"messages": HELLO, "stream": True}).encode()
    with opened(server) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        soon(lambda: server.left()["requests"], 1)
        soon(server.left, NOTHING)
        soon(server.connections, 0)


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /ping HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
        b"GET /%ff%00/..%2f HTTP/1.1\r\nHost: x\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\n{",
        POST + b"Content-Length: \xc2\xb2\r\n\r\n",
        POST + b"Content-Length: 2\r\nContent-Encoding: \xff\r\n\r\n{}",
    ],
)
def test_what_is_no_request_of_http_is_refused_at_once(start, sent: bytes) -> None:
    server = start()
    with opened(server) as raw, ended_within(5):
        raw.sendall(sent)
        assert raw.recv(1000).startswith(b"HTTP/1.1 4")
    soon(server.left, NOTHING)
    assert send(server.port, "GET", "/ping")[0] == 200
