"""What this package serves beside Gradio: uploads, and the files of a conversation to whoever has its token."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from kangaroo_jax.errors import UserError
from kangaroo_jax.web.drawing import PATH
from kangaroo_jax.web.sessions import Sessions, Shown
from kangaroo_jax.web.texts import texts

log = logging.getLogger(__name__)
_PIECE = 1 << 20  # bytes that are gathered before they are written
_SILENCE = 60.0  # seconds in which nothing of an upload may come
# Types under which a browser only ever shows or plays a file, by the first bytes.
_PLAYED = (
    (b"\x1aE\xdf\xa3", 0, "video/webm"),
    (b"ftyp", 4, "video/mp4"),
    (b"OggS", 0, "video/ogg"),
    (b"\x89PNG", 0, "image/png"),
    (b"\xff\xd8\xff", 0, "image/jpeg"),
    (b"GIF8", 0, "image/gif"),
    (b"WEBP", 8, "image/webp"),
)
_AS_IT_IS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-store",
}


def routes(sessions: Sessions) -> list[Route]:
    """The routes."""

    async def upload(request: Request) -> Response:
        """Take a file in, as the raw body of a request."""
        session = sessions.opened(request.path_params["token"])
        if session is None:
            return _refused(texts("en").gone, 404)
        try:
            async with _received(request) as pieces:
                with session.receiving(request.query_params.get("name", "")) as receiver:
                    stated = request.headers.get("content-length", "")
                    if stated.isascii() and stated.isdigit() and int(stated[:18]) > session.limit:
                        receiver.refuse_size()
                    async for piece in pieces:
                        await run_in_threadpool(receiver.write, piece)
        except UserError as error:
            return _refused(str(error), 413)
        except ClientDisconnect:
            return Response(status_code=499)
        return JSONResponse({"name": receiver.name})

    async def media(request: Request) -> Response:
        """A file of a conversation."""
        session = sessions.opened(request.path_params["token"])
        held = session.held(request.path_params["number"]) if session is not None else None
        return Response(status_code=404) if held is None else _Held(*held)

    return [
        Route(PATH + "/upload/{token}", upload, methods=["PUT"]),
        Route(PATH + "/media/{token}/{number:int}", media, methods=["GET", "HEAD"]),
    ]


class _Held(FileResponse):
    """A file that is there until it is sent, whatever becomes of its conversation."""

    def __init__(self, shown: Shown, release: Callable[[], None]) -> None:
        self._release = release
        with shown.medium.path.open("rb") as file:
            head = file.read(16)
        kind = next((name for word, at, name in _PLAYED if head[at:].startswith(word)), "application/octet-stream")
        super().__init__(shown.medium.path, media_type=kind, headers=_AS_IT_IS)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See `Response`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


@contextlib.asynccontextmanager
async def _received(request: Request) -> AsyncIterator[AsyncIterator[bytes]]:
    """The pieces of a body, gathered to some size."""

    async def gathered() -> AsyncGenerator[bytes, None]:
        block, stream = bytearray(), request.stream()
        while (piece := await _next(stream)) is not None:
            block += piece
            if len(block) >= _PIECE:
                yield bytes(block)
                block.clear()
        if block:
            yield bytes(block)

    pieces = gathered()
    try:
        yield pieces
    finally:
        await pieces.aclose()


async def _next(stream: AsyncIterator[bytes]) -> bytes | None:
    """The next piece of a body, None at its end. Raises UserError where it does not come."""
    try:
        async with asyncio.timeout(_SILENCE):
            return await anext(stream, None)
    except TimeoutError:
        raise UserError(f"nothing came for {_SILENCE:g} s") from None


def _refused(text: str, status: int) -> Response:
    return JSONResponse({"error": text}, status_code=status, headers={"Connection": "close"})
