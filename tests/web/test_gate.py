"""The page's gate by itself: who may ask under which name."""

import asyncio

import pytest

from kangaroo_jax.web.gate import Gate


async def _inner(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def status(gate: Gate, host: str | None, path: str = "/") -> int:
    sent = []

    async def send(message):
        sent.append(message)

    headers = [] if host is None else [(b"host", host.encode())]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers, "query_string": b""}
    asyncio.run(gate(scope, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_page_on_this_machine_answers_to_this_machines_names(host):
    gate = Gate(_inner, host, ("films.example",))
    for name in ("localhost", "localhost:7860", "127.0.0.1:9", "[::1]:9", "FILMS.example", "films.example:443"):
        assert status(gate, name) == 200, name
    for name in ("evil.example", "films.example.evil.example", "10.0.0.1", "127.0.0.1.evil.example", "", "[", None):
        assert status(gate, name) == 403, name


def test_a_page_for_others_answers_to_any_name():
    gate = Gate(_inner, "0.0.0.0")
    assert status(gate, "machine.example") == status(gate, "10.0.0.1:7860") == 200
    assert status(gate, "machine.example", "/gradio_api/file=/etc/passwd") == 404


def posted(body: bytes, more: bool = False) -> int:
    """The status of a request to Gradio's queue; with `more` its body never ends."""
    sent = []

    async def receive():
        await asyncio.sleep(0.02 if more else 0)
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "query_string": b""}
    asyncio.run(Gate(_inner, "127.0.0.1")(scope | {"headers": [(b"host", b"localhost")]}, receive, send))
    return sent[0]["status"]


def test_a_request_names_no_file():
    assert posted(b'{"data": ["What?", 0]}') == 200
    for data in (b'{"path": "/etc/passwd"}', b'[[{"a": [{"url": "http://127.0.0.1"}]}]]', b'{"meta": 1}', b"[" * 9999):
        assert posted(b'{"data": [%s]}' % data) == 400
    assert posted(bytes(1 << 19)) == 413


def test_a_request_that_does_not_end_is_refused(monkeypatch):
    monkeypatch.setattr("kangaroo_jax.web.gate._SECONDS", 0.05)
    assert posted(b"[", more=True) == 408
