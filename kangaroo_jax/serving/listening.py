"""Where a server listens, said in a line and in a file, and uvicorn without its signals."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from kangaroo_jax.errors import UserError
from kangaroo_jax.system.files import write_text


class Quiet(uvicorn.Server):
    """uvicorn's, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at an address. Raises UserError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(found[0], socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--host={host}: {error.strerror or error}") from None
    with opened:
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(found[4])
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--host={host} --port={port}: cannot listen there ({reason})") from None
        yield opened


def announced(opened: socket.socket, port_file: str) -> str:
    """The address of a socket, whose port is written to a file where one is named."""
    host, port = opened.getsockname()[:2]
    if port_file:
        write_text(Path(port_file), f"{port}\n")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
