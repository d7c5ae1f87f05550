"""What every request passes: only what the page needs of Gradio is reached, from this page alone, in small bodies.

Gradio reads and serves files by names in requests, fetches addresses, and has pages about itself. The page uses none
of that: its files go through `routes`, so that a request which names a file to Gradio is refused before it is read.
"""

import asyncio
import ipaddress
import json
import re
from typing import Any
from urllib.parse import SplitResult, urlsplit

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import parse_json
from kangaroo_jax.web.drawing import PATH

MOST_BYTES = 1 << 18  # of a request to Gradio
_SECONDS = 30.0  # in which it must be here
_ASSETS = ("/assets/", "/static/", "/svelte/")
_READ = re.compile(
    r"/(config/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|gradio_api/(info/?|theme\.css|startup-events"
    r"|app_id/?|queue/data|heartbeat/[\w-]{1,64}))?",
    re.ASCII,
)
_WRITTEN = re.compile(r"/gradio_api/(queue/join/?|cancel|reset/?)", re.ASCII)
_OF_FILES = frozenset(("path", "url", "meta", "_type"))  # keys of what Gradio takes for a file
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; "
        b"worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: Any, host: str, hosts: tuple[str, ...] = ()) -> None:
        """`host`: where the page listens; `hosts`: names of it that a proxy before it has."""
        self._app = app
        self._names = frozenset(("localhost", *(name.lower() for name in hosts)))
        self._any_name = not (_is_loopback(host) or host == "localhost")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        method, path = scope["method"], scope["path"]
        reads = method in ("GET", "HEAD")
        if not self._is_ours(headers.get("host", "")) or not _same_origin(headers, reads):
            await _refuse(send, 403, "this page answers only itself")
        elif path.startswith(PATH + "/"):
            await self._app(scope, receive, _with_headers(send, is_page=False))
        elif reads and (_READ.fullmatch(path) or path.startswith(_ASSETS)) and "deep_link" not in _query(scope):
            await self._app(scope, receive, _with_headers(send, is_page=True))
        elif method == "POST" and _WRITTEN.fullmatch(path):
            await self._write(scope, receive, send)
        else:
            await _refuse(send, 404, "there is nothing here")

    async def _write(self, scope: Any, receive: Any, send: Any) -> None:
        """Hand a body on that is small and names no file."""
        body, loop = bytearray(), asyncio.get_running_loop()
        due = loop.time() + _SECONDS
        while True:
            try:
                async with asyncio.timeout_at(due):
                    message = await receive()
            except TimeoutError:
                await _refuse(send, 408, "the request does not end")
                return
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > MOST_BYTES:
                await _refuse(send, 413, "too much was sent")
                return
            if not message.get("more_body"):
                break
        try:
            if body and _names_a_file(parse_json(bytes(body), "the request")):
                raise UserError("files are not taken here")
        except (UserError, RecursionError) as error:
            await _refuse(send, 400, str(error))
            return
        handed = False

        async def again() -> Any:
            nonlocal handed
            if handed:
                return await receive()
            handed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, again, _with_headers(send, is_page=True))

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this machine: another's name that leads here would make its page ours."""
        name = _parts(f"//{host}").hostname
        return self._any_name or (name is not None and (name in self._names or _is_loopback(name)))


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _same_origin(headers: dict[str, str], reads: bool) -> bool:
    """Whether no other site's page asks. One that merely leads here may read the page."""
    if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not (
        reads and headers.get("sec-fetch-mode") == "navigate"
    ):
        return False
    origin = headers.get("origin")
    return origin is None or _parts(origin).netloc.lower() == headers.get("host", "").lower()


def _parts(address: str) -> SplitResult:
    """The parts of an address, none where it is no address."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _names_a_file(value: Any) -> bool:
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if not _OF_FILES.isdisjoint(one):
                return True
            left += one.values()
        elif isinstance(one, list):
            left += one
    return False


def _query(scope: Any) -> str:
    return str(scope.get("query_string", b""), "latin-1")


def _with_headers(send: Any, *, is_page: bool) -> Any:
    added = _HEADERS if is_page else _HEADERS[1:]

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            ours = {name for name, _ in added}
            kept = [pair for pair in message["headers"] if pair[0].lower() not in ours]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return sending


async def _refuse(send: Any, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *_HEADERS[1:]]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
