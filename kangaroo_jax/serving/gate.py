"""What every HTTP request passes: an id, its API key, and a line in the log when it ends."""

import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import Any

from kangaroo_jax.errors import printable
from kangaroo_jax.serving.answers import encoded
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.service import Call, Service

log = logging.getLogger("kangaroo_jax.serving.access")

_OPEN = ("/health", "/ping")  # what needs no key
_QUIET = ("/health", "/ping", "/metrics")  # what is asked every few seconds
_GOOD_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: Any, service: Service, keys: tuple[str, ...]) -> None:
        """`keys`: one of which a request must show; (): none is asked for."""
        self._app, self._service = app, service
        self._keys = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        call = Call(asked if _GOOD_ID.fullmatch(asked) else secrets.token_hex(12))
        scope["kangaroo.call"] = call
        status = 500

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", call.number.encode())]
            await send(message)

        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path in _OPEN or self._opens(headers.get(b"authorization", b""), call):
                await self._app(scope, receive, sending)
            else:
                await _refuse(sending)
        finally:
            self._log(scope, call, status)

    def _opens(self, authorization: bytes, call: Call) -> bool:
        """Whether a request may pass. All keys are compared, each in the same time whatever it is."""
        scheme, _, word = authorization.partition(b" ")
        shown = hashlib.sha256(word.strip() if scheme.lower() == b"bearer" else b"").digest()
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(key, shown)
        if found:
            call.key = shown
        return found or not self._keys

    def _log(self, scope: Any, call: Call, status: int) -> None:
        if scope["path"] in _QUIET and status < 400:
            return
        self._service.metrics.status(status)
        notes = "".join(f" {name}={value}" for name, value in call.notes.items())
        took = time.monotonic() - call.begun
        client = (scope.get("client") or ("-",))[0]
        who = call.key.hex()[:8] or "-"
        what = printable(f"{scope['method']} {scope['path'][:200]}")
        log.info("%s %s %s %s %d %.3f s%s", call.number, client, who, what, status, took, notes)


async def _refuse(send: Any) -> None:
    error = ApiError("the API key is missing or none of this server's", status=401, code="invalid_api_key")
    body = encoded(error.body())
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
