"""What the server refuses because it is too much, what it does beside its event loop, and clients that leave."""

import contextlib
import dataclasses
import gc
import json
import socket
import threading
import time
import tracemalloc
from typing import Any

import pytest

from kangaroo_jax.errors import UserError
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.shares import Shares
from kangaroo_jax.serving.turnstile import Turnstile
from tests.serving.test_app import NOTHING, about, ask, photo, send, soon

openai = pytest.importorskip("openai")


# ---------------------------------------------------------------------------------- bounds


def test_a_body_is_counted_as_it_comes(start) -> None:
    server = start(Limits(max_body_mb=1, max_bodies_mb=1))
    status, _, body = send(server.port, "POST", "/v1/chat/completions", b" " * (3 << 20))
    assert status == 413 and b"a body of 3 MB, limit 1 MB (--max-body-mb)" in body
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:  # a body of unknown length
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(40):
                raw.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert b" 413 " in raw.recv(1000)
    soon(server.left, NOTHING)


def test_packed_bodies_and_slow_ones_are_refused(start) -> None:
    server = start(Limits(max_body_seconds=0.3))
    status, _, body = send(server.port, "POST", "/tokenize", b"\x1f\x8b", Content_Encoding="gzip")
    assert status == 415 and b"Content-Encoding" in body
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in raw.recv(1000)
    soon(server.left, NOTHING)


def held(server: Any, count: int, key: str = "none", **fields: Any) -> list[Any]:
    """So many streams that have begun and wait for the engine."""
    server.engine.go.clear()
    before = len(server.engine.tickets)
    streams = [ask(server.client(key), stream=True, **fields) for _ in range(count)]
    soon(lambda: len(server.engine.tickets) - before, count)
    return streams


def test_requests_are_bounded_in_all_and_by_key(start) -> None:
    server = start(Limits(max_requests=3, max_key_requests=2), keys=("a", "b"))
    streams = held(server, 2, "a")
    with pytest.raises(openai.RateLimitError) as of_key:
        ask(server.client("a"))
    assert "--max-key-requests" in str(of_key.value) and int(of_key.value.response.headers["retry-after"]) >= 1
    streams += held(server, 1, "b")
    with pytest.raises(openai.RateLimitError, match="--max-requests"):
        ask(server.client("b"))
    server.engine.go.set()
    assert all(list(stream)[-1].choices[0].finish_reason == "stop" for stream in streams)
    soon(server.left, NOTHING)
    ask(server.client("a"))


def test_frames_are_bounded_in_a_request_and_in_all(start, films) -> None:
    server = start(Limits(max_request_frames=8, max_frames_in_flight=5))
    film = about(f"file://{films}/a.mp4")
    with pytest.raises(openai.APIStatusError) as many:
        ask(server.client(), [{"role": "user", "content": film[0]["content"] * 3}])
    assert many.value.status_code == 413 and "--max-request-frames" in str(many.value)
    streams = held(server, 1, messages=film)
    with pytest.raises(openai.RateLimitError, match="--max-frames-in-flight"):
        ask(server.client(), film)
    server.engine.go.set()
    assert list(streams[0])
    soon(server.left, NOTHING)


def test_a_key_leaves_to_others_as_much_as_it_takes(start, films) -> None:
    film = about(f"file://{films}/a.mp4")
    frames = 4
    for keys, most in ((("a", "b"), 4), (("a",), 8)):
        server = start(Limits(max_frames_in_flight=8 * frames), keys=keys)
        streams = held(server, most, "a", messages=film)
        with pytest.raises(openai.RateLimitError, match="--max-frames-in-flight"):
            ask(server.client("a"), film)
        streams += held(server, 1, "b", messages=film) if "b" in keys else []
        server.engine.go.set()
        assert all(list(stream)[-1].choices[0].finish_reason == "stop" for stream in streams)
        soon(server.left, NOTHING)


def test_shares_leave_something_to_whoever_comes() -> None:
    shares = Shares(100, several=True)
    for owner in range(6):
        key = bytes([owner])
        assert shares.refuses(key, 1, alone=False) is None, owner
        while shares.refuses(key, 1, alone=False) is None:
            shares.take(key, 1)
    assert [shares.held(bytes([owner])) for owner in range(6)] == [50, 25, 12, 6, 3, 2]
    assert shares.refuses(b"new", 1, alone=False) is None and shares.refuses(b"new", 2, alone=True) is None
    assert shares.refuses(b"new", 3, alone=True) == "" and "this API key" in str(shares.refuses(b"\0", 1, alone=False))
    shares.give_back(b"\0", 50)
    assert shares.total == 48 and shares.held(b"\0") == 0


def test_a_turnstile_lets_few_of_each_in_and_who_waits_may_leave() -> None:
    turnstile, entered, go = Turnstile(1), [], threading.Event()

    def enter(owner: str, check: Any = lambda: None) -> None:
        with turnstile.passed(owner.encode(), check):
            entered.append(owner)
            go.wait(10)

    def gone() -> None:
        raise OSError

    threads = [threading.Thread(target=enter, args=(owner,)) for owner in "aaab"]
    for thread in threads:
        thread.start()
    soon(lambda: sorted(entered), ["a", "b"])
    with pytest.raises(OSError):
        enter("b", gone)
    assert len(entered) == 2
    go.set()
    for thread in threads:
        thread.join(10)
    assert sorted(entered) == ["a", "a", "a", "b"]


def test_a_request_has_a_time_to_live(start) -> None:
    server = start(Limits(max_request_seconds=0.5))
    server.engine.go.clear()
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server.client())
    assert caught.value.status_code == 504 and "--max-request-seconds" in str(caught.value)
    with pytest.raises(openai.APIError, match="too long"):
        list(ask(server.client(), stream=True))
    soon(lambda: [ticket.cancelled for ticket in server.engine.tickets], [True, True])
    soon(server.left, NOTHING)


# ------------------------------------------------------------------- work that takes long


@pytest.mark.parametrize("text", ["word " * 1_000_000, "x" * 5_000_000, "视频" * 1_000_000])
def test_a_text_that_is_far_too_long_is_refused_soon(start, tokenizer, text: str) -> None:
    server = start()
    counted: list[str] = []
    counting = dataclasses.replace(tokenizer, _encode=lambda piece: counted.append(piece) or tokenizer.encode(piece))
    server.service.backend = dataclasses.replace(server.service.backend, tokenizer=counting)
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [text[:100_000]] * 40}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
    ):
        status, _, said = send(server.port, "POST", path, body)
        assert status == 400 and json.loads(said)["error"]["code"] == "context_length_exceeded"
    status, _, said = send(server.port, "POST", "/tokenize", {"prompt": text})
    assert status == 413 and b"more than 8000 tokens" in said
    assert sum(map(len, counted)) < 500_000
    soon(server.left, NOTHING)


def test_health_answers_while_media_and_bodies_are_read(start, monkeypatch) -> None:
    server = start()
    monkeypatch.setattr(server.service.backend.prompts, "_probe", lambda *_: time.sleep(1.5) or 1 / 0)

    threads = [
        threading.Thread(target=lambda: send(server.port, "POST", "/v1/chat/completions", {"messages": about(photo())}))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    slowest = 0.0
    for _ in range(20):
        begun = time.perf_counter()
        assert send(server.port, "GET", "/health")[0] == 200
        slowest = max(slowest, time.perf_counter() - begun)
        time.sleep(0.02)
    assert slowest < 1.0  # of a machine that does other things
    for thread in threads:
        thread.join()


def test_slow_media_of_one_key_hold_up_no_other(start, monkeypatch) -> None:
    server = start(keys=("slow", "other"))
    over = threading.Event()
    monkeypatch.setattr(server.service.backend.prompts, "_probe", lambda *_: over.wait(20) and 1 / 0)
    body, key = {"messages": about(photo())}, {"Authorization": "Bearer slow"}
    asking = [
        threading.Thread(target=send, args=(server.port, "POST", "/v1/chat/completions", body), kwargs=key)
        for _ in range(server.service.limits.max_key_requests)
    ]
    for thread in asking:
        thread.start()
    soon(lambda: server.left()["requests"], len(asking))
    assert ask(server.client("other").with_options(timeout=5)).choices
    over.set()
    for thread in asking:
        thread.join()
    soon(server.left, NOTHING)


def test_long_answers_are_written_beside_the_event_loop(start, tokenizer) -> None:
    server = start()
    names: list[str] = []

    def decode(ids: list[int]) -> str:
        names.append(threading.current_thread().name)
        return tokenizer.decode(ids)

    watched = dataclasses.replace(tokenizer, _decode=decode)
    server.service.backend = dataclasses.replace(server.service.backend, tokenizer=watched)
    ask(server.client(), logprobs=True, top_logprobs=2)
    assert send(server.port, "POST", "/tokenize", {"prompt": "Which way?", "return_token_strs": True})[0] == 200
    assert len(names) > 5 and all(name.startswith("media") for name in names)


def test_a_refused_body_is_not_kept_until_garbage_is_collected(start) -> None:
    server = start(Limits(max_body_mb=2))
    gc.disable()
    tracemalloc.start()
    try:
        for content in (b" " * (3 << 20), b'{"messages": [], "a": "' + b"x" * (1 << 20) + b'"}'):
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(8):
                assert send(server.port, "POST", "/v1/chat/completions", content)[0] in (400, 413)
            assert tracemalloc.get_traced_memory()[0] - before < 2 << 20
    finally:
        tracemalloc.stop()
        gc.enable()


# ---------------------------------------------------------------------- clients that leave


def test_a_client_that_leaves_a_stream_ends_it(start) -> None:
    server = start()
    server.engine.pieces, server.engine.pause = ("word ",) * 1000, 0.02
    stream = ask(server.client(), stream=True)
    next(iter(stream))
    stream.close()
    soon(lambda: server.engine.tickets[0].cancelled, True)
    soon(server.left, NOTHING)


def test_a_client_that_leaves_without_a_stream_ends_it_too(start, films) -> None:
    server = start()
    server.engine.go.clear()
    with pytest.raises(openai.APITimeoutError):
        ask(server.client().with_options(timeout=0.5), about(f"file://{films}/a.mp4"), n=2)
    soon(lambda: [ticket.cancelled for ticket in server.engine.tickets], [True, True])
    soon(server.left, NOTHING)


def test_a_client_that_leaves_while_its_media_are_read(start, monkeypatch) -> None:
    server = start()
    reached = []

    def slow(*_: Any) -> Any:
        reached.append(1)
        time.sleep(1)
        raise UserError("late")

    monkeypatch.setattr(server.service.backend.prompts, "_probe", slow)
    with pytest.raises(openai.APITimeoutError):
        ask(server.client().with_options(timeout=0.4), about(photo()))
    assert reached
    soon(server.left, NOTHING)
    assert not server.engine.tickets


def test_a_client_that_leaves_while_it_sends(start) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        soon(lambda: server.left()["requests"], 1)
    soon(server.left, NOTHING)
