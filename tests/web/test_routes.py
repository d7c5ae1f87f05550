"""Uploads that stall or break off leave nothing."""

import asyncio
import json

import pytest

from tests.web.conftest import files_in

pytest.importorskip("starlette")


def put(talk, token: str, *messages: dict) -> tuple[int, bytes]:
    """(status, body) of an upload whose body comes in these messages, and then no more."""
    from starlette.applications import Starlette

    from kangaroo_jax.web.routes import routes

    sent, left = [], list(messages)

    async def receive():
        while not left:
            await asyncio.sleep(1)
        return left.pop(0)

    async def send(message):
        sent.append(message)

    path = f"/kangaroo/upload/{token}"
    scope = {
        "type": "http",
        "method": "PUT",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
    }
    scope |= {"query_string": b"name=a.mp4", "headers": [], "http_version": "1.1", "server": ("localhost", 1)}
    asyncio.run(Starlette(routes=routes(talk.sessions))(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def piece(data: bytes, more: bool = True) -> dict:
    return {"type": "http.request", "body": data, "more_body": more}


def test_an_upload(begin):
    talk = begin()
    session = talk.sessions.of("page")
    assert put(talk, session.token, piece(b"12"), piece(b"34", more=False)) == (200, b'{"name":"a.mp4"}')
    assert session.shown[0].medium.path.read_bytes() == b"1234"
    assert put(talk, "another", piece(b"12", more=False))[0] == 404


def test_an_upload_that_stalls_is_given_up(begin, monkeypatch):
    monkeypatch.setattr("kangaroo_jax.web.routes._SILENCE", 0.05)
    talk = begin()
    status, body = put(talk, talk.sessions.of("page").token, piece(bytes(2 << 20)))
    assert status == 413 and json.loads(body) == {"error": "nothing came for 0.05 s"} and files_in(talk) == 0


def test_an_upload_that_breaks_off_leaves_nothing(begin):
    talk = begin()
    assert put(talk, talk.sessions.of("page").token, piece(bytes(2 << 20)), {"type": "http.disconnect"})[0] == 499
    assert files_in(talk) == 0 and talk.sessions._store.written == 0
