"""Connections of clients: how many there may be, and how long one may keep the server waiting.

uvicorn bounds how long a connection may be silent after an answer. A client that sends the head of a request a letter a
minute, that goes on with a body which was refused long ago, or that does not read its answer, would hold a connection
for ever; so each has so many seconds from one answer to the whole head of the next request, whatever it does meanwhile,
and as many to read on where it is behind.
"""

import asyncio
import functools
import resource
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 30.0  # from one answer, or the first byte, to the whole head of the next request
_MOST = 1024  # connections
_DESCRIPTORS = 65_536  # that are asked for, where the system allows as many


class Connection(H11Protocol):
    """uvicorn's, with a bound on how long it waits for a client."""

    def __init__(
        self, *args: Any, waiting: "dict[Connection, asyncio.TimerHandle]", seconds: float, most: int, **named: Any
    ) -> None:
        """`waiting`: those of a server that are in no request, the longest first; `most`: connections of all kinds."""
        super().__init__(*args, **named)
        self._waiting, self._seconds, self._most = waiting, seconds, most
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Where it is one too many, the one goes that has waited longest: this one, where all others are answered."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self._most:
            next(iter(self._waiting)).give_up()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._proceed()
        super().connection_lost(exc)
        self.resume_writing()

    def handle_events(self) -> None:
        """Look at what has come; the head of a request ends the waiting."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._proceed()

    def on_response_complete(self) -> None:
        """An answer is on its way: wait for what comes next."""
        self._wait()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        self._unread = self.loop.call_later(self._seconds, self.give_up)
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def give_up(self) -> None:
        """Break the connection off, and drop what the client did not read."""
        self._proceed()
        self.transport.abort()

    def _wait(self) -> None:
        self._proceed()
        self._waiting[self] = self.loop.call_later(self._seconds, self.give_up)

    def _proceed(self) -> None:
        timer = self._waiting.pop(self, None)
        if timer is not None:
            timer.cancel()


def config_of(app: Any, *, seconds: float = SECONDS, most: int | None = None) -> uvicorn.Config:
    """How uvicorn serves the application; `seconds` as above, `most` connections (as many as descriptors allow)."""
    http: Any = functools.partial(Connection, waiting={}, seconds=seconds, most=most or _allowed())
    return uvicorn.Config(
        app,
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(SECONDS),
    )


def _allowed() -> int:
    """Connections that leave descriptors for all else; the process gets as many of these as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, soft // 2))
